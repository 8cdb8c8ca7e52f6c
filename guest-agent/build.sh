#!/bin/bash
# Builds the guest's initramfs: build.sh OUT makes OUT/initramfs.cpio.
#
# It needs cargo, gcc, cpio and libseccomp-dev (Debian's names), and takes nothing from the network but crates.
set -euo pipefail

out=$(realpath -m "${1:?usage: build.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")"

triple=$(uname -m)-unknown-linux-gnu
libraries=/usr/lib/$(uname -m)-linux-gnu
# A target folder and a target triple of its own keep +crt-static away from build scripts and the other crates.
target=${CARGO_TARGET_DIR:-../target}/agent

if [[ ! -e $libraries/libseccomp.a ]]; then
    echo "build.sh: $libraries/libseccomp.a is missing: install libseccomp-dev" >&2
    exit 1
fi

RUSTFLAGS="-C target-feature=+crt-static" \
LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$libraries \
    cargo build --profile agent --locked --package runvm-agent --target "$triple" --target-dir "$target"

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
install -D "$target/$triple/agent/runvm-agent" "$root/init"
mkdir -p "$root"/{dev,proc,root,run,sys}
mknod -m 600 "$root/dev/console" c 5 1
# The same input makes the same archive, byte by byte.
find "$root" -exec touch --no-dereference --date=@0 {} +

mkdir -p "$out"
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible) \
    > "$out/initramfs.cpio.new"
mv "$out/initramfs.cpio.new" "$out/initramfs.cpio"
echo "build.sh: $out/initramfs.cpio: $(stat --format=%s "$out/initramfs.cpio") bytes"
