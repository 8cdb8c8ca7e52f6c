#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# check-install.sh DIST: hold the image that installs runvm on a node to what it
# is for, with a folder in the node's place: the files are there, and containerd
# understands what it is told, by each version of its configuration.
set -euo pipefail

readonly dist=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here

main() {
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$here/image.sh" "$dist" "$work" >/dev/null
    mkdir "$work/image"
    tar --extract --file "$work/runvm-image.tar" --to-stdout layer.tar | tar --extract --directory "$work/image"

    node none
    [[ $(known) == *'io.containerd.runvm.v2'* ]] || fail "containerd does not know runvm: $(known)"
    node two 'version = 2' '[plugins."io.containerd.grpc.v1.cri"]' '  sandbox_image = "mine"'
    [[ $(known) == *'io.containerd.runvm.v2'* ]] || fail "containerd does not know runvm: $(known)"
    grep -q mine "$config" || fail 'what the configuration had is gone'
    node three 'version = 3'
    grep -qF 'io.containerd.cri.v1.runtime' "$config" || fail 'version 3 was not told in its words'
    node one 'version = 1' && fail 'a configuration of version 1 was changed'
    echo 'check-install: 4 kinds of nodes, all as they should be'
}

# Installs twice on a node whose configuration has these lines; the second time changes nothing.
node() {
    local name=$1 before
    shift
    node=$work/image/$name
    config=$node/etc/containerd/config.toml
    mkdir -p "$node/etc/containerd"
    (($# == 0)) || printf '%s\n' "$@" >"$config"
    into_node "$name" || return
    "$node/usr/local/bin/runvm" --version >/dev/null || fail 'the program does not run'
    cmp "$dist/bin/containerd-shim-runvm-v2" "$node/usr/local/bin/containerd-shim-runvm-v2"
    cmp "$dist/lib/runvm/vmlinux" "$node/usr/local/lib/runvm/vmlinux"
    before=$(find "$node" -type f -exec sha256sum {} +)
    into_node "$name"
    [[ $(find "$node" -type f -exec sha256sum {} +) == "$before" ]] || fail 'the second time something changed'
}

into_node() {
    chroot "$work/image" /bin/busybox env -i PATH=/bin RUNVM_RESTART=no /install "/$1"
}

known() {
    containerd --config "$config" config dump | grep -A 12 'runtimes.runvm\]' || true
}

fail() {
    echo "check-install: $*" >&2
    exit 1
}

main
