#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# build.sh OUTDIR: put the guest kernels `vmlinux` and `vmlinux-pvm` into OUTDIR.
#
# They are made from Debian's package linux-source-6.12, config/*.config and
# patches/*.patch, and kept in the cache under a hash of all that, so that a
# second run only copies.
set -euo pipefail

readonly SERIES=6.12
readonly SOURCE_PACKAGE=linux-source-$SERIES
readonly IMAGES=(vmlinux vmlinux-pvm)
readonly BUILD_PACKAGES=(bc bison flex gcc libc6-dev libelf-dev make patch perl xz-utils)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly cache=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/kernel

main() {
    [[ $# == 1 ]] || die "usage: $0 OUTDIR"
    local out=$1 image version
    mkdir -p "$out" "$cache"
    install_packages
    version=$(source_version)

    for image in "${IMAGES[@]}"; do
        local cached
        cached=$cache/$image-$(input_hash "$image" "$version")
        [[ -d $cached ]] || build_locked "$image" "$version" "$cached"
        publish "$cached/vmlinux" "$out/$image"
    done
}

# One build at a time in a cache: a second caller waits and finds the result.
build_locked() {
    local image=$1 version=$2 cached=$3 lock
    exec {lock}>"$cache/lock"
    flock --nonblock "$lock" || { say "$image: waiting for another build"; flock "$lock"; }
    [[ -d $cached ]] || build "$image" "$version" "$cached"
    exec {lock}>&-
}

build() {
    local image=$1 version=$2 cached=$3
    local log=$cache/$image.log
    rm -rf "$cache"/build.* # what a killed build left: ours is the lock
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    : >"$log"

    say "$image: unpacking $SOURCE_PACKAGE $version"
    unpack_source "$version" "$work"
    apply_patches "$work/source" "$log"
    say "$image: configuring"
    configure "$image" "$work" "$log"
    compile "$image" "$work" "$log"
    [[ $cached == *-$(input_hash "$image" "$version") ]] ||
        die "$image: its inputs changed while it was built, run this again"

    mkdir "$work/result"
    perl "$here/pack-elf.pl" "$work/build/vmlinux" "$work/result/vmlinux"
    cp "$work/build/.config" "$work/result/config"
    cp "$work/build/System.map" "$work/result/System.map"
    mv -T "$work/result" "$cached"
    say "$image: $(stat -c %s "$cached/vmlinux") bytes"
    rm -rf "$work" "$log"
    trap - EXIT
}

unpack_source() {
    local version=$1 dir=$2 deb
    deb=$(source_deb "$version")
    # Half of the tree is what no x86 guest compiles. Kconfig files have to stay.
    dpkg-deb --fsys-tarfile "$deb" |
        tar -xO "./usr/src/$SOURCE_PACKAGE.tar.xz" |
        tar -xJ -C "$dir" --transform "s,^$SOURCE_PACKAGE,source," \
            --exclude='*/Documentation/*.*' --exclude='*/tools/testing' \
            --exclude='*/arch/[!x]*/*.[chS]' --exclude='*/arch/*/boot/dts' \
            --exclude='*/sound/*.[ch]' --exclude='*/drivers/gpu/*.[ch]' \
            --exclude='*/drivers/media/*.[ch]' --exclude='*/drivers/staging/*.[ch]' \
            --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/drivers/net/wireless/*.[ch]'
}

# Patches are for both images: without CONFIG_PVM_GUEST they change nothing.
apply_patches() {
    local source=$1 log=$2 patch
    for patch in "$here"/patches/*.patch; do
        patch --directory="$source" --strip=1 --fuzz=0 <"$patch" >>"$log" ||
            die "$patch does not apply to $SOURCE_PACKAGE (see $log)"
    done
}

configure() {
    local image=$1 work=$2 log=$3
    local wanted=$work/wanted.config
    cat "$here/config/common.config" "$here/config/$image.config" >"$wanted"
    kernel_make "$work" KCONFIG_ALLCONFIG="$wanted" allnoconfig >>"$log" 2>&1 ||
        die "$image: the configuration failed (see $log)"
    check_config "$image" "$wanted" "$work/build/.config"
}

# Kconfig drops in silence what its dependencies do not allow.
check_config() {
    local image=$1 wanted=$2 got=$3 line symbol missing=()
    while IFS= read -r line; do
        symbol=${line%%=*}
        case $line in
        CONFIG_*=n) grep -q "^$symbol=" "$got" && missing+=("$line") ;;
        CONFIG_*) grep -qxF "$line" "$got" || missing+=("$line") ;;
        esac
    done <"$wanted"
    [[ ${#missing[@]} == 0 ]] ||
        die "$image: config/*.config asks for what this kernel does not give: ${missing[*]}"
}

compile() {
    local image=$1 work=$2 log=$3 line shown=$SECONDS began=$SECONDS objects=0
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        [[ $line == *" CC "* ]] && objects=$((objects + 1))
        if ((SECONDS - shown >= 10)); then
            shown=$SECONDS
            say "$image: compiling, $objects files, $((SECONDS - began)) s"
        fi
    done < <(kernel_make "$work" --jobs="$(nproc)" vmlinux 2>&1 || true)
    [[ -e $work/build/vmlinux ]] || die "$image: the build failed, see $log:"$'\n'"$(tail -n 20 "$log")"
    say "$image: compiled $objects files in $((SECONDS - began)) s"
}

# The same inputs give the same bytes, whoever builds them wherever and whenever.
kernel_make() {
    local work=$1
    shift
    KBUILD_BUILD_USER=runvm KBUILD_BUILD_HOST=runvm KBUILD_BUILD_TIMESTAMP='1970-01-01' \
        nice -n 5 make --no-print-directory -C "$work/source" O="$work/build" "$@"
}

# Copied beside and renamed: a running guest keeps the file it opened.
publish() {
    local from=$1 to=$2
    cmp -s "$from" "$to" && return
    cp "$from" "$to.$$"
    mv "$to.$$" "$to"
}

input_hash() {
    local image=$1 version=$2
    {
        echo "$image" "$version"
        gcc --version
        ld --version
        cat "$here"/{build.sh,apt.sh,pack-elf.pl} "$here/config/"{common,"$image"}.config "$here"/patches/*.patch
    } | sha256sum | cut -c 1-16
}

say() {
    printf 'kernel: %s\n' "$*" >&2
}

die() {
    printf 'kernel: %s\n' "$*" >&2
    exit 1
}

# shellcheck source=kernel/apt.sh
source "$here/apt.sh"
main "$@"; exit # nothing more is read: the file may change while it runs
