#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# fuzz.sh [TARGET...]: run these fuzz targets, or all, each for FUZZ_SECONDS (60),
# as many at once as there are processors. One line for each; one that finds
# something fails, and says where the input is that shows it.
#
# fuzz.sh TARGET FILE: do once what that input says.
#
# Needs root: the share is served in a mount namespace.
set -euo pipefail

readonly CARGO_FUZZ=0.13.2
HERE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
readonly HERE
# What is worth knowing for the next run, by target.
readonly CACHE=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/fuzz
readonly TARGET_DIR=${CARGO_TARGET_DIR:-$HERE/../../target}/fuzz
readonly PROGRAMS=$TARGET_DIR/x86_64-unknown-linux-gnu/release

# Programs of a few hundred steps; a guest's single buffers are made by a few bytes each.
readonly MAX_LENGTH=2048
# Work without end, in seconds for all of an input. The slowest that mean well take a tenth of it.
readonly TIMEOUT=10
# Memory without end, in MiB: for the process with its sanitizer, and for one allocation.
readonly MEMORY=1024 ALLOCATION=64

main() {
    build
    if (($# == 2)) && [[ -f $2 ]]; then
        RUST_BACKTRACE=1 exec "$PROGRAMS/$1" "${limits[@]}" "$2"
    fi
    local target targets=("$@") failures=0
    (($# > 0)) || mapfile -t targets < <(cargo_fuzz list)
    for target in "${targets[@]}"; do
        (($(jobs -rp | wc -l) < $(nproc))) || wait -n || failures=$((failures + 1))
        fuzz "$target" &
    done
    while [[ -n $(jobs -p) ]]; do
        wait -n || failures=$((failures + 1))
    done
    ((failures == 0))
}

# Freed memory is kept from use for a while, to see who uses it still: not for as long as to count as memory without end.
export ASAN_OPTIONS=quarantine_size_mb=32${ASAN_OPTIONS:+:$ASAN_OPTIONS}
readonly limits=("-max_len=$MAX_LENGTH" "-timeout=$TIMEOUT" "-rss_limit_mb=$MEMORY" "-malloc_limit_mb=$ALLOCATION")

# The sanitizers and what libFuzzer listens to are nightly's, officially. The
# profile is the release's without what makes a program small.
build() {
    local sanitizer=none runtime
    for runtime in "$(rustc --print sysroot)"/lib/rustlib/x86_64-unknown-linux-gnu/lib/librustc-*_rt.asan.a; do
        [[ ! -e $runtime ]] || sanitizer=address
    done
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_PANIC=unwind CARGO_PROFILE_RELEASE_STRIP=none \
        RUSTC_BOOTSTRAP=1 cargo_fuzz build --features libfuzzer --sanitizer "$sanitizer" \
        --codegen-units 16 --target-dir "$TARGET_DIR"
}

cargo_fuzz() {
    local command=$1
    shift
    "$("$HERE/../../packaging/cargo-tool.sh" cargo-fuzz "$CARGO_FUZZ")" fuzz "$command" --fuzz-dir "$HERE" "$@"
}

fuzz() {
    local target=$1 corpus=$CACHE/corpus/$1 found=$CACHE/found/$1 log=$CACHE/$1.log status=0
    mkdir -p "$corpus" "$found"
    local seeds=()
    [[ ! -d $HERE/seeds/$target ]] || seeds=("$HERE/seeds/$target")
    RUNVM_FUZZ_RECORD=$found/last RUST_BACKTRACE=1 nice "$PROGRAMS/$target" "${limits[@]}" \
        -max_total_time="${FUZZ_SECONDS:-60}" -len_control=20 -print_final_stats=1 \
        -artifact_prefix="$found/" "$corpus" "${seeds[@]}" >"$log" 2>&1 || status=$?
    if ((status == 0)); then
        summary "$target" "$log"
        rm -f "$log" "$found/last"
        return
    fi
    # What it died of comes before the stack, and the stack before what libFuzzer counts.
    awk '/panicked at|ERROR:/ { said = 1 } said && lines++ < 100' "$log"
    printf 'fuzz: %s FAILED; the input that shows it: %s\n' "$target" "$(reproducer "$log" "$found")"
    printf '      again: vmm/fuzz/fuzz.sh %s FILE; all that was said: %s\n' "$target" "$log"
    return 1
}

summary() {
    awk -v target="$1" '
        / cov: / { for (i = 1; i < NF; i++) if ($i == "cov:") coverage = $(i + 1) }
        /^stat::number_of_executed_units/ { runs = $2 }
        /^stat::average_exec_per_sec/ { rate = $2 }
        /^stat::peak_rss_mb/ { memory = $2 }
        END { printf "fuzz: %-10s ok %9d runs %6d/s %6d edges %5d MiB\n", target, runs, rate, coverage, memory }
    ' "$2"
}

# libFuzzer names the file, unless it ended where it could not write one.
reproducer() {
    local name
    name=$(sed -n 's/.*Test unit written to //p' "$1" | tail -n 1)
    if [[ ! -s $name && -s $2/last ]]; then
        name=$2/crash-$(sha1sum "$2/last" | cut -c -40)
        cp "$2/last" "$name"
    fi
    printf '%s' "$name"
}

main "$@"
