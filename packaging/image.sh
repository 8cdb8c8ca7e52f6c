#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# image.sh DIST OUTDIR: make OUTDIR/runvm-image.tar, the image that installs
# runvm on a node (packaging/kubernetes/install.yaml), of what `make build` laid
# out in DIST. It is in the form of `docker save`.
set -euo pipefail

readonly dist=$1 out=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly applets='sh cat cmp cp grep head mkdir mv nsenter sed'

main() {
    work=$(mktemp -d "$out/image.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/root/bin" "$work/root/runvm"
    cp /bin/busybox "$work/root/bin/busybox"
    local applet sum
    for applet in $applets; do
        ln -s busybox "$work/root/bin/$applet"
    done
    "$here/install.sh" "$dist" "$work/root/runvm"
    cp -r "$here/containerd" "$work/root/runvm/containerd"
    install -m 755 "$here/kubernetes/install.sh" "$work/root/install"

    tar --create --file "$work/layer.tar" --directory "$work/root" --sort=name --owner=0 --group=0 --numeric-owner .
    sum=$(sha256sum "$work/layer.tar" | cut -d ' ' -f 1)
    cat >"$work/config.json" <<END
{"os":"linux","architecture":"amd64","config":{"Env":["PATH=/bin"],"Entrypoint":["/install"]},
"rootfs":{"type":"layers","diff_ids":["sha256:$sum"]}}
END
    echo '[{"Config":"config.json","RepoTags":["runvm-install:latest"],"Layers":["layer.tar"]}]' >"$work/manifest.json"
    tar --create --file "$out/runvm-image.tar" --directory "$work" config.json manifest.json layer.tar
    echo "$out/runvm-image.tar"
}

main
