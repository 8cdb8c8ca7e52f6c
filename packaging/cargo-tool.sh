#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# cargo-tool.sh NAME VERSION: print the path of a program of crates.io, in this
# version. It is kept in the cache. Without optimization each that is used here
# is built within a minute.
set -euo pipefail

readonly name=$1 version=$2
root=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/$name-$version
if [[ ! -x $root/bin/$name ]]; then
    env --unset=CARGO_TARGET_DIR CARGO_PROFILE_DEV_DEBUG=false \
        cargo install --locked --debug --root "$root" "$name@$version" >&2
fi
printf '%s\n' "$root/bin/$name"
