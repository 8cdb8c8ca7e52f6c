#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# install.sh DIST PREFIX: copy what `make build` laid out below PREFIX.
set -euo pipefail

readonly dist=$1 prefix=$2

for program in runvm containerd-shim-runvm-v2; do
    install -D -m 755 "$dist/bin/$program" "$prefix/bin/$program"
done
for file in vmlinux vmlinux-pvm initramfs.cpio; do
    install -D -m 644 "$dist/lib/runvm/$file" "$prefix/lib/runvm/$file"
done
