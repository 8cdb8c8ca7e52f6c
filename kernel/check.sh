#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# check.sh VMLINUX: check a guest kernel: its size, and, in a small guest, that
# what containers need is there (check-init.c). Exits with 77 where this machine
# cannot run the image at all.
set -euo pipefail

readonly MAX_BYTES=10000000
readonly PVM_HOST_NAME=kvm-pvm # in images with CONFIG_PVM_GUEST, and only there

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here

main() {
    [[ $# == 1 && -r ${1:-} ]] || die "usage: $0 VMLINUX"
    local kernel=$1
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT

    check_size "$kernel"
    if grep -q "$PVM_HOST_NAME" "$kernel"; then
        is_pvm_host || { echo "skipped: $kernel needs a PVM host"; exit 77; }
        boot "$kernel" "" -accel kvm -cpu host,-arch-capabilities
    elif has_vmx_or_svm && [[ -w /dev/kvm ]]; then
        boot "$kernel" CHECK_32BIT=1 -accel kvm -cpu host
    else
        boot "$kernel" CHECK_32BIT=1 -accel tcg -cpu max
    fi
}

check_size() {
    local bytes
    bytes=$(stat -c %s "$1")
    ((bytes < MAX_BYTES)) || die "$1 has $bytes bytes, more than $MAX_BYTES"
    echo "size: $bytes bytes"
}

has_vmx_or_svm() {
    grep -qwE 'vmx|svm' /proc/cpuinfo
}

# KVM without the processor's help: whether it is this kind of it, the boot shows.
is_pvm_host() {
    [[ -w /dev/kvm ]] && ! has_vmx_or_svm
}

# The guest's arguments are environment variables: QEMU adds the devices at the
# line's end, so "--" would hide them from the kernel.
boot() {
    local kernel=$1 arguments=$2 khz output
    shift 2
    gcc -Os -static -o "$work/init" "$here/check-init.c"
    (cd "$work" && echo init | cpio --quiet -o -H newc >initramfs.cpio)
    khz=$(awk -F: '/^cpu MHz/ { printf "%d", $2 * 1000; exit }' /proc/cpuinfo)

    output=$(timeout 120 qemu-system-x86_64 "$@" \
        -M microvm,x-option-roms=off,isa-serial=off,pit=off,pic=off,acpi=off \
        -m 256M -nodefaults -no-user-config -display none -no-reboot \
        -global virtio-mmio.force-legacy=false -device virtio-serial-device,max_ports=1 \
        -chardev stdio,id=console -device virtconsole,chardev=console \
        -kernel "$kernel" -initrd "$work/initramfs.cpio" \
        -append "quiet console=hvc0 reboot=t panic=-1 noreplace-smp pci=off \
            tsc_early_khz=$khz tsc=reliable lapic_timer_khz=1000000 $arguments" </dev/null 2>&1) || true
    echo "$output"
    [[ $output == *"checked: "*" 0 missing"* ]] || die "$kernel does not have all that containers need"
}

die() {
    echo "kernel check: $*" >&2
    exit 1
}

main "$@"
