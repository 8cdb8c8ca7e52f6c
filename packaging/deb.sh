#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# deb.sh DIST OUTDIR: make OUTDIR/runvm_VERSION_amd64.deb of what `make build`
# laid out in DIST.
set -euo pipefail

readonly dist=$1 out=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly program=$dist/bin/runvm

main() {
    local version package
    version=$("$program" --version | sed -n 's,^runvm version ,,p')
    package=$out/runvm_${version}_amd64.deb
    root=$(mktemp -d "$out/deb.XXXXXX")
    trap 'rm -rf "$root"' EXIT
    chmod 755 "$root"

    "$here/install.sh" "$dist" "$root/usr"
    install -D -m 644 "$here/copyright" "$root/usr/share/doc/runvm/copyright"
    mkdir "$root/DEBIAN"
    control "$version" >"$root/DEBIAN/control"
    (cd "$root" && find usr -type f -exec md5sum {} +) >"$root/DEBIAN/md5sums"
    dpkg-deb --root-owner-group --build "$root" "$package"
}

control() {
    cat <<END
Package: runvm
Version: $1
Architecture: amd64
Maintainer: runvm's authors <runvm@localhost>
Section: admin
Priority: optional
Recommends: qemu-system-x86
Installed-Size: $(du -sk "$root/usr" | cut -f 1)
Description: OCI container runtime that gives every container a virtual machine
 runvm takes the place of runc: it runs a standard OCI bundle, unchanged, in a
 small virtual machine of its own, under Docker, under containerd and by hand.
 It uses KVM where that works, and QEMU's translator elsewhere.
END
}

main
