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
# It becomes the guest's root, through which the root of a user namespace has to find its way too.
chmod 755 "$root"
install -D "$program" "$root/init"
mkdir -p "$root"/{dev,proc,root,run,sys}
mknod -m 600 "$root/dev/console" c 5 1
# The same input makes the same archive, byte by byte.
find "$root" -exec touch --no-dereference --date=@0 {} +

archive() { LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible; }

# Two archives, one behind the other, with zeros in between: the program begins at a page of the file, behind a header
# of 116 bytes with its name. So each page of it in the guest's memory is one of the file, which the VMM knows again.
mkdir -p "$out"
cd "$root"
find . -path ./init -prune -o -print | archive > "$out/initramfs.cpio.new"
truncate --size=$((4096 - 116)) "$out/initramfs.cpio.new"
echo init | archive >> "$out/initramfs.cpio.new"
[[ $(od --address-radix=n --skip-bytes=4097 --read-bytes=3 --format=c "$out/initramfs.cpio.new") == *E*L*F* ]]
mv "$out/initramfs.cpio.new" "$out/initramfs.cpio"
echo "build.sh: $out/initramfs.cpio: $(stat --format=%s "$out/initramfs.cpio") bytes"
