#!/bin/bash
# Builds the guest's initramfs: build.sh OUT makes OUT/initramfs.cpio.
#
# It needs cargo, gcc, cpio, libseccomp-dev and libcap-ng-dev (Debian's names), and takes nothing from the network but
# crates.
set -euo pipefail

out=$(realpath -m "${1:?usage: build.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")"

program=$(../packaging/cargo-static.sh runvm-agent)

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
install -D "$program" "$root/init"
mkdir -p "$root"/{dev,proc,root,run,sys}
mknod -m 600 "$root/dev/console" c 5 1
# The same input makes the same archive, byte by byte.
find "$root" -exec touch --no-dereference --date=@0 {} +

mkdir -p "$out"
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible) \
    > "$out/initramfs.cpio.new"
mv "$out/initramfs.cpio.new" "$out/initramfs.cpio"
echo "build.sh: $out/initramfs.cpio: $(stat --format=%s "$out/initramfs.cpio") bytes"
