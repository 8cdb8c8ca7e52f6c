#!/usr/bin/env bash
# Builds the root file systems that the suites, the benchmark and the demo run,
# from the distribution's packages alone: no image registry is needed.
#
#   conformance/images.sh busybox|debian|docker|pause
#
# Prints the path of a tar of the root file system (for `docker import`, or to
# unpack as a bundle's rootfs). It is kept in the cache under a hash of what
# went into it, so that only the first call builds.
set -euo pipefail

name=${1:?usage: conformance/images.sh busybox|debian|docker|pause}
cache=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/images
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What the Debian images have on top of debootstrap's minbase.
debian_packages=(python3 nodejs iproute2 iptables)
docker_packages=(docker.io containerd runc iptables)

versions() {
    apt-cache policy "$@" | awk '/^[^ ]/ { name = $1 } /Candidate:/ { print name, $2 }'
}

inputs() {
    cat "$here/images.sh"
    case $name in
    busybox) versions busybox-static ;;
    pause) versions catatonit ;;
    debian) versions base-files libc6 "${debian_packages[@]}" ;;
    docker) versions base-files libc6 "${docker_packages[@]}" ;;
    *)
        echo "conformance/images.sh: no image is called '$name': say busybox, debian, docker or pause" >&2
        exit 1
        ;;
    esac
}

# Where this machine fetches Debian from, and as which suite.
mirror() {
    apt-get indextargets --format '$(SITE) $(CODENAME)' \
        'Created-By: Packages' 'Origin: Debian' 'Component: main' 'Label: Debian' |
        grep -E " $(. /etc/os-release && echo "$VERSION_CODENAME")\$" | head -n 1
}

# The few files without which programs that look up users and names misbehave.
accounts() {
    mkdir -p "$1"/etc "$1"/root "$1"/tmp "$1"/home/user
    chmod 1777 "$1/tmp"
    chown 1000:1000 "$1/home/user"
    printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n' >"$1/etc/passwd"
    printf 'root:x:0:\nstaff:x:50:user\nuser:x:1000:\n' >"$1/etc/group"
}

build_busybox() {
    mkdir -p "$1"/{bin,dev,proc,sys,var/tmp}
    accounts "$1"
    cp /bin/busybox "$1/bin/busybox"
    for applet in $(/bin/busybox --list); do
        [[ $applet == busybox ]] || ln -s busybox "$1/bin/$applet"
    done
}

# What holds a pod's namespaces: one static program, that waits and reaps.
build_pause() {
    cp /usr/bin/catatonit "$1/pause"
}

build_debian() {
    bootstrap "$1" "${debian_packages[@]}"
}

# An engine of its own.
build_docker() {
    bootstrap "$1" "${docker_packages[@]}"
}

# Debian's minbase with more packages, in a folder.
bootstrap() {
    local include site codename
    include=$(
        IFS=,
        echo "${*:2}"
    )
    read -r site codename < <(mirror)
    debootstrap --variant=minbase --include="$include" "$codename" "$1" "$site" >&2
    # What only a package manager or a reader of documentation would miss.
    rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/* "$1"/debootstrap
    find "$1/usr/share/doc" "$1/usr/share/man" "$1/usr/share/locale" -mindepth 1 -delete
    : >"$1/etc/resolv.conf"
    echo 127.0.0.1 localhost >"$1/etc/hosts"
}

key=$(inputs | sha256sum | cut -c1-16)
image=$cache/$name-$key.tar
if [[ ! -e $image ]]; then
    echo "conformance: building the $name image (kept in $cache)" >&2
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.$name-XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
    chmod 755 "$work"
    mkdir "$work/rootfs"
    "build_$name" "$work/rootfs"
    tar --create --numeric-owner --xattrs --directory "$work/rootfs" --file "$work/image.tar" .
    mv "$work/image.tar" "$image"
fi
echo "$image"
