#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# test.sh: all that has to pass, after `make build`. A step that fails does not
# keep the next from running; any failure is the whole's.
set -euo pipefail

readonly CARGO_DENY=0.20.2
# What a step exits with that cannot be taken on this machine.
readonly SKIPPED=77

cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
summary=()
failures=0

main() {
    step 'formatting' with_component rustfmt cargo fmt --all --check
    step 'clippy' with_component clippy cargo clippy --locked --workspace --all-targets -- -D warnings
    step 'documentation' env RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps
    step 'crates' crates
    step 'shell scripts' shell_scripts
    # Both select the whole workspace, so that nothing is built twice.
    step 'unit tests' cargo test --locked --workspace --lib --bins --no-fail-fast
    step 'fuzzing' vmm/fuzz/fuzz.sh
    step 'vmlinux' kernel/check.sh target/dist/lib/runvm/vmlinux
    step 'vmlinux-pvm' kernel/check.sh target/dist/lib/runvm/vmlinux-pvm
    step 'installation' packaging/check-install.sh target/dist
    step 'suites' cargo test --locked --workspace --test '*' --no-fail-fast
    conclude
}

step() {
    local name=$1 began=$SECONDS status=0 result
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" </dev/null 2>&1 | tee -a "$log" || status=${PIPESTATUS[0]}
    case $status in
    0) result=ok ;;
    "$SKIPPED") result=skipped ;;
    *) result=FAILED failures=$((failures + 1)) ;;
    esac
    summary+=("$(printf '%-16s %7s %5d s' "$name" "$result" $((SECONDS - began)))")
}

# A toolchain that came by rustup may lack a component, and rustup may get it.
with_component() {
    local component=$1
    shift
    if ! "$1" "$2" --version >/dev/null 2>&1; then
        rustup component add "$component" || {
            echo "skipped: this toolchain has no $component, and rustup cannot add it"
            return "$SKIPPED"
        }
    fi
    "$@"
}

crates() {
    local deny
    deny=$(packaging/cargo-tool.sh cargo-deny "$CARGO_DENY") || return
    "$deny" --locked check --deny warnings bans licenses sources
}

shell_scripts() {
    local scripts
    # Those that others source are looked at where they are sourced.
    mapfile -t scripts < <(find . -path ./target -prune -o -name '*.sh' -perm -u+x -print)
    shellcheck --external-sources --severity=warning .ci/run "${scripts[@]}"
}

conclude() {
    printf '\n== summary\n'
    printf '%s\n' "${summary[@]}"
    grep -e '^test result: ' -e '^fuzz: ' "$log" || echo 'no test ran'
    ((failures == 0))
}

main
