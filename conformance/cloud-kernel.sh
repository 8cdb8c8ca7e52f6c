#!/usr/bin/env bash
# Fetches the distribution's kernel for cloud machines, with which the suite
# `ordinary` boots a machine that has an ordinary KVM. The package is unpacked,
# never installed: this machine keeps its own kernel.
#
#   conformance/cloud-kernel.sh
#
# Prints the path of a folder with `vmlinuz` and, numbered in the order in which
# they have to be loaded, the `modules`. It is kept in the cache under a hash of
# what went into it, so that only the first call fetches.
set -euo pipefail

cache=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/cloud-kernel
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# An empty package whose one dependency is the newest kernel.
readonly LATEST=linux-image-cloud-amd64
# KVM by SVM, and what the runtime's network devices are made with.
readonly MODULES=(virt/lib/irqbypass arch/x86/kvm/kvm arch/x86/kvm/kvm-amd drivers/net/tun)

# A field of the version of a package that apt would install; empty where apt knows none.
field() {
    { apt-cache show --no-all-versions "$1" 2>/dev/null || true; } | sed -n "s/^$2: \([^ ,]*\).*/\1/p"
}

# Which version apt would install, and where it is kept; fails where apt knows none.
locate() {
    package=$(field "$LATEST" Depends)
    [[ -n $package ]] || return
    version=$(field "$package" Version)
    [[ -n $version ]] || return
    kernel=$cache/$({ cat "$here/cloud-kernel.sh" && echo "$package $version"; } | sha256sum | cut -c1-16)
}

# apt's own user cannot write into the folder of root's.
download() {
    (cd "$work" && apt-get -o APT::Sandbox::User=root download --quiet "$package=$version" >&2)
}

update() {
    apt-get update --quiet >&2
    locate || {
        echo "conformance/cloud-kernel.sh: apt knows no package $LATEST" >&2
        exit 1
    }
}

# Lists that are missing or stale are fetched only when they turn out to be.
locate || update
if [[ ! -e $kernel ]]; then
    echo "conformance: fetching $package $version (kept in $cache)" >&2
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
    download || { update && download; }
    dpkg-deb --extract "$work"/*.deb "$work/package"
    mkdir -p "$work/kernel/modules"
    cp "$work"/package/boot/vmlinuz-* "$work/kernel/vmlinuz"
    for index in "${!MODULES[@]}"; do
        module=${MODULES[index]}
        cp "$work"/package/lib/modules/*/kernel/"$module.ko" "$work/kernel/modules/$index-${module##*/}.ko"
    done
    # Another run may have been faster.
    mv --no-target-directory "$work/kernel" "$kernel" || [[ -e $kernel ]]
fi
echo "$kernel"
