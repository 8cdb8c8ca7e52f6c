#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# cargo-static.sh PACKAGE: build a package's program without shared
# libraries, and print where it is.
#
# The agent is alone in its initramfs. The runtime is started several times for
# each container, and a third of a start was finding and joining libraries.
set -euo pipefail

readonly package=$1
machine=$(uname -m)
readonly machine triple=$machine-unknown-linux-gnu libraries=/usr/lib/$machine-linux-gnu
# A target folder and a target triple of its own keep +crt-static away from build scripts and tests.
readonly target=${CARGO_TARGET_DIR:-$(dirname "${BASH_SOURCE[0]}")/../target}/static

for library in libseccomp libcap-ng; do
    [[ -e $libraries/$library.a ]] || { echo "$0: $libraries/$library.a is missing: install $library-dev" >&2; exit 1; }
done

flags='-C target-feature=+crt-static'
# Each page of addresses that the program would have to add its own place to is a fault, which is dear in a guest. Its
# place is no secret there: all that are forked from one template have the same.
[[ $package != runvm-agent ]] || flags+=' -C relocation-model=static'

RUSTFLAGS=$flags \
    LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$libraries \
    LIBCAPNG_LINK_TYPE=static LIBCAPNG_LIB_PATH=$libraries \
    cargo build --release --locked --package "$package" --target "$triple" --target-dir "$target" >&2
echo "$target/$triple/release/$package"
