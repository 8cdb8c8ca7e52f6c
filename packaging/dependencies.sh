#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# dependencies.sh PURPOSE...: install what building, testing, measuring or
# demonstrating runvm needs, from the distribution's packages. Where all is
# there it changes nothing and asks no network.
#
# The purposes: build, run, lint, test, fuzz, bench, demo.
set -euo pipefail

readonly RUST_VERSION=1.91

packages_for() {
    case $1 in
    # gcc is Rust's linker; libseccomp is the guest's, libcap-ng virtiofsd's;
    # what the kernel needs kernel/build.sh installs itself.
    build) echo gcc libc6-dev libcap-ng-dev libseccomp-dev cpio ;;
    run) echo qemu-system-x86 ;;
    # clippy builds the suites too, and with them the CRI's messages.
    lint) echo shellcheck protobuf-compiler ;;
    # The engines with their networks and their init, what the images are made of, the
    # ps that `docker top` runs, the machine that has an ordinary KVM, the second
    # runtime that the OCI's programs run against, libFuzzer's compiler, and that of
    # the CRI's messages.
    # conformance/setup.sh installs what those programs are built with itself.
    test)
        echo docker.io containerd runc podman conmon netavark aardvark-dns catatonit iptables iproute2 \
            containernetworking-plugins busybox-static debootstrap procps qemu-system-x86 crun g++ protobuf-compiler
        ;;
    fuzz) echo g++ ;;
    bench) echo crun runsc ;;
    demo) echo docker.io containerd runc iptables iproute2 busybox-static debootstrap ;;
    *) die "no purpose is called '$1': say build, run, lint, test, fuzz, bench or demo" ;;
    esac
}

main() {
    (($# > 0)) || die "usage: $0 build|run|lint|test|fuzz|bench|demo ..."
    local purpose package missing=()
    for purpose; do
        [[ $purpose != build ]] || check_toolchain
        for package in $(packages_for "$purpose"); do
            installed "$package" || missing+=("$package")
        done
    done
    [[ ${#missing[@]} == 0 ]] || install_packages "${missing[@]}"
}

installed() {
    [[ $(dpkg-query --show --showformat='${db:Status-Abbrev}' "$1" 2>/dev/null || true) == ii* ]]
}

install_packages() {
    ((EUID == 0)) || die "installing $* needs root: run it as root"
    command -v apt-get >/dev/null || die "there is no apt-get here: install $* in this machine's way"
    # One at a time: two would restore each other's policy.
    exec {lock}>/run/lock/runvm-dependencies
    flock "$lock"
    forbid_services
    say "installing $*"
    # Lists that are missing or stale are fetched only when they turn out to be.
    apt_install "$@" || { apt-get update --quiet && apt_install "$@"; } ||
        die "apt-get cannot install $*; its messages are above"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
        install --quiet --yes --no-install-recommends "$@" </dev/null
}

# Packages start their services unless this file says no (101): an engine that
# nobody asked for would stay behind.
readonly policy=/usr/sbin/policy-rc.d
readonly kept_policy=$policy.before-runvm
readonly mark='by runvm, while it installs packages'

forbid_services() {
    trap restore_policy EXIT
    # A run that was killed left its own here: that is no policy to keep.
    [[ ! -e $policy ]] || grep -q "$mark" "$policy" || mv "$policy" "$kept_policy"
    printf '#!/bin/sh\n# %s\nexit 101\n' "$mark" >"$policy"
    chmod 755 "$policy"
}

restore_policy() {
    rm -f "$policy"
    [[ ! -e $kept_policy ]] || mv "$kept_policy" "$policy"
}

check_toolchain() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) ||
        die "there is no cargo in PATH: install Rust $RUST_VERSION or later, for example with https://rustup.rs"
    [[ $(printf '%s\n' "$RUST_VERSION" "$version" | sort --version-sort | head -n 1) == "$RUST_VERSION" ]] ||
        die "cargo is of Rust $version: runvm needs Rust $RUST_VERSION or later (rustup update stable)"
}

say() {
    printf 'dependencies: %s\n' "$*" >&2
}

die() {
    say "$*"
    exit 1
}

main "$@"
