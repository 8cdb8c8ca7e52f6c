#!/bin/sh
# The first process of the machine that the suite `ordinary` boots: it makes a plain host of the kernel's initramfs, runs
# the cases one by one, and reports on the second serial port.
set -eu

# Nobody can pivot out of an initramfs. Seen through a bind mount it is a root file system like any other.
if [ -z "${STAGED:-}" ]; then
    mount --bind / /stage
    export STAGED=yes
    exec chroot /stage /init
fi

export PATH=/opt/runvm/bin:/bin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in /modules/*; do
    insmod "$module"
done
ifconfig lo up

# report KIND: each line of the standard input becomes a line of the report.
report() {
    awk -v tag="$name $1" '{ print tag, $0 }' >&3
}

# What a container is made of on its host: its folder, its cgroups, its processes.
traces() {
    find /run/runvm /sys/fs/cgroup -mindepth 1 -type d 2>/dev/null || true
    # Threads of the kernel have no program, and what runs this script is busybox.
    for process in /proc/[0-9]*; do
        program=$(readlink "$process/exe") || continue
        [ "$program" = /bin/busybox ] || echo "$process $program"
    done
}

exec 3>/dev/ttyS1
for folder in /cases/*; do
    name=${folder##*/}
    cd "$folder"
    : >/tmp/log
    traces >/tmp/before
    code=0
    ID=$name timeout -s KILL 180 sh -eu ./script </dev/null >/tmp/out 2>/tmp/err || code=$?
    report out </tmp/out
    report err </tmp/err
    report log </tmp/log
    traces | awk 'FILENAME != "-" { before[$0]; next } !($0 in before)' /tmp/before - | report left
    echo "$code" | report exit
done
# Closing waits until all has been sent.
exec 3>&-
poweroff -f
