#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# demo.sh: run a program in a virtual machine of its own under a real Docker
# daemon, and tell what ran it. `make demo` builds first what it needs.
#
# The daemon is private: it lives in PID, network and mount namespaces of its
# own, where its sockets, bridge, packet filter and mounts are nobody else's and
# end with it, however it ends. Only the imported image is kept, in the cache.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly dist=$here/../target/dist
readonly cache=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/demo
# The distribution's engine, whatever else is on PATH.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

readonly bridge_address=172.31.251.1
readonly server=$bridge_address:8080
readonly image=runvm-demo
# Below which, in every hierarchy, the containers' cgroups are.
readonly cgroup=runvm-demo
# In the private world, where /run is empty at first.
readonly work=/run/demo

main() {
    if [[ ${1:-} == --inside ]]; then
        show "$2" "$3"
        return
    fi
    ((EUID == 0)) || die "a container engine needs root: run it as root"
    mkdir -p "$cache"
    exec {lock}>"$cache/lock"
    flock --nonblock "$lock" || die "another demo is running"

    local tar data
    tar=$("$here/../conformance/images.sh" debian)
    # The daemon keeps its images in a folder that is named after the image's content.
    data=$cache/$(basename "$tar" .tar)
    find "$cache" -mindepth 1 -maxdepth 1 -type d ! -path "$data" -exec rm -rf --one-file-system {} +
    mkdir -p "$data"

    world=
    trap tidy_up EXIT
    enter_private_world "$tar" "$data"
}

enter_private_world() {
    setpriv --pdeathsig KILL unshare --fork --pid --kill-child --mount-proc --net --mount --propagation private \
        "$here/demo.sh" --inside "$@" </dev/null {lock}>&- &
    world=$!
    wait "$world"
}

# Whoever is in the private world dies with it, and some take a moment for that: a
# cgroup can be removed when its last process is gone.
tidy_up() {
    trap '' INT TERM HUP
    [[ -z $world ]] || kill -KILL "$world" 2>/dev/null || true
    wait
    for _ in {1..100}; do
        find /sys/fs/cgroup -depth -type d -path "*/$cgroup*" -exec rmdir {} + 2>/dev/null && break
        sleep 0.1
    done
}

show() {
    local tar=$1 data=$2
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
    ip link set lo up
    mkdir -p "$work/volume" "$work/web"
    start_docker "$data"
    if ! docker image inspect "$image" >/dev/null 2>&1; then
        say "importing the image"
        docker import --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin' "$tar" "$image" >/dev/null
    fi

    cp "$here/demo/program.py" "$work/volume/"
    echo "a file in a volume" >"$work/volume/letter"
    echo "a server on the bridge" >"$work/web/greeting"
    busybox httpd -p "$server" -h "$work/web"

    run_program
    tell
    docker_stop
}

start_docker() {
    local data=$1
    say "starting a private Docker daemon"
    printf '{ "runtimes": { "runvm": { "path": "%s" } } }\n' "$(realpath "$dist/bin/runvm")" >"$work/daemon.json"
    export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/client
    dockerd --config-file "$work/daemon.json" --host "$DOCKER_HOST" --bip "$bridge_address/24" \
        --data-root "$data" --exec-root "$work/docker" --pidfile "$work/docker.pid" \
        --cgroup-parent "/$cgroup" >"$work/docker.log" 2>&1 &
    dockerd=$!
    until docker version >/dev/null 2>&1; do
        kill -0 "$dockerd" 2>/dev/null || die "the daemon ended:"$'\n'"$(tail -n 20 "$work/docker.log")"
        sleep 0.1
    done
}

docker_stop() {
    kill "$dockerd"
    wait "$dockerd" || true
}

run_program() {
    local command=(docker run --rm --runtime=runvm --volume "$work/volume:/data:ro" "$image"
        python3 /data/program.py "http://$server/greeting")
    say "${command[*]}"
    local line last='' began=${EPOCHREALTIME/[.,]/}
    first='' guest_kernel=''
    while IFS= read -r line; do
        first=${first:-$((${EPOCHREALTIME/[.,]/} - began))}
        printf '  | %s\n' "$line"
        [[ $line != 'my kernel is '* ]] || guest_kernel=${line#my kernel is }
        last=$line
    done < <("${command[@]}" || echo "docker run failed with status $?")
    [[ -n $guest_kernel && $last == 'done' ]] || die "the program did not come to its end"
}

tell() {
    printf '\n'
    printf '%-15s %s\n' \
        'host kernel:' "$(uname -r)" \
        'guest kernel:' "$guest_kernel" \
        'accelerator:' "$("$dist/bin/runvm" check | sed -n 's/^accelerator: //p')" \
        'first output:' "$((first / 1000000)).$(printf %06d $((first % 1000000)) | cut -c 1-2) s after the command"
}

say() {
    printf 'demo: %s\n' "$*" >&2
}

die() {
    say "$*"
    exit 1
}

main "$@"
