#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=dash
#
# install.sh HOST: what the image of runvm does: copy it below HOST/usr/local,
# tell containerd of it, and have containerd read that. What is there already
# is left alone; the same again changes nothing.
set -eu

readonly host=$1
readonly config=$host/etc/containerd/config.toml
# Where a running container has its own files of the image.
readonly files=${RUNVM_FILES:-/runvm}

main() {
    # A program that runs cannot be written to, but be replaced.
    for file in bin/runvm bin/containerd-shim-runvm-v2 lib/runvm/vmlinux lib/runvm/vmlinux-pvm lib/runvm/initramfs.cpio; do
        mkdir -p "$host/usr/local/${file%/*}"
        cmp -s "$files/$file" "$host/usr/local/$file" || {
            cp -p "$files/$file" "$host/usr/local/$file.new"
            mv "$host/usr/local/$file.new" "$host/usr/local/$file"
        }
    done
    if grep -qs 'runtimes\.runvm\]' "$config"; then
        echo 'containerd knows runvm already'
        return
    fi
    mkdir -p "$host/etc/containerd"
    # Where there is none containerd has its defaults, which this keeps.
    [ -s "$config" ] || echo 'version = 2' >"$config"
    cp -p "$config" "$config.before-runvm"
    case $(sed -n 's/^ *version *= *//p' "$config" | head -n 1) in
    3*) cat "$files/containerd/config-v3.toml" >>"$config" ;;
    2*) cat "$files/containerd/config-v2.toml" >>"$config" ;;
    *) echo "$config is neither of version 2 nor of 3: add the runtime by hand, see docs/containerd.md" >&2; exit 1 ;;
    esac
    restart
}

# In the host's namespaces, where it has an init system that knows containerd.
restart() {
    [ "${RUNVM_RESTART:-yes}" = yes ] || return 0
    nsenter -t 1 -m -u -i -n -p -- systemctl restart containerd ||
        echo 'containerd was not restarted: restart it to make it know runvm' >&2
}

main
