#!/usr/bin/env bash
# Installs the engines that the suites run against (and, with `bench`, those of the
# benchmark, or, with `oci`, what the programs of the OCI need), from the
# distribution's packages, without starting their services.
#
#   conformance/setup.sh [bench|oci]
set -euo pipefail

packages=(
    docker.io containerd runc            # the engines, and the runtime that judges every test first
    podman conmon catatonit              # the one without a daemon, what watches for it, and the init that it gives
    netavark aardvark-dns                # its network
    iptables iproute2                    # dockerd's network, the suites' own bridge and addresses
    containernetworking-plugins          # the network of pods
    busybox-static debootstrap           # the images
    procps                               # `docker top` runs the host's ps
    qemu-system-x86                      # the machine that has an ordinary KVM
)
case ${1:-} in
bench) packages+=(crun runsc) ;;
oci)
    # The second runtime that is validated, and what validation/build.sh needs.
    packages+=(
        crun golang-go
        golang-github-{blang-semver,google-uuid,hashicorp-go-multierror,mrunalp-fileutils}-dev
        golang-github-opencontainers-{selinux,specs}-dev
        golang-github-{sirupsen-logrus,urfave-cli,xeipuuv-gojsonschema}-dev
        golang-gocapability-dev golang-golang-x-sys-dev
    )
    ;;
esac

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query --show --showformat='${db:Status-Abbrev}' "$package" 2>/dev/null || true)
    [[ $status == ii* ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    exit 0
fi

if ((EUID != 0)); then
    echo "conformance/setup.sh: installing ${missing[*]} needs root: run it as root" >&2
    exit 1
fi

# A package's service must not start: a daemon that nobody asked for would stay
# behind. Debian asks this file first; 101 means "not allowed".
policy=/usr/sbin/policy-rc.d
restore_policy() {
    rm -f "$policy"
    if [[ -e $policy.before-runvm ]]; then
        mv "$policy.before-runvm" "$policy"
    fi
}
if [[ -e $policy ]]; then
    mv "$policy" "$policy.before-runvm"
fi
trap restore_policy EXIT
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

echo "conformance: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install --quiet --yes --no-install-recommends "${missing[@]}" >&2
}
# Lists that are missing or stale are fetched only when they turn out to be.
install || { apt-get update --quiet >&2 && install; }
