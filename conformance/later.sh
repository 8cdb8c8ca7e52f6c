#!/usr/bin/env bash
# Fetches packages of a later release of the distribution than this machine's, so
# that the suites also meet the engines that it does not have yet. They are
# unpacked, never installed.
#
#   conformance/later.sh RELEASE PACKAGE...
#
# Prints the path of a folder with all that the packages contain. It is kept in
# the cache, so that only the first call fetches; remove it there to have a newer one.
set -euo pipefail

release=${1:?usage: conformance/later.sh RELEASE PACKAGE...}
shift
cache=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/later

# Lists of our own, from wherever this machine fetches Debian: the machine's
# set-up stays as it is. apt's own user cannot write here.
readonly apt=$cache/apt-$release
readonly APT=(-o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=- -o Acquire::Languages=none
    -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt" -o APT::Sandbox::User=root)

main() {
    local tree
    tree=$cache/$release-$(IFS=- && echo "$*")
    mkdir -p "$cache"
    # One at a time: a second caller waits and finds the result.
    exec {lock}>"$cache/lock"
    flock "$lock"
    [[ -d $tree ]] || fetch "$tree" "$@"
    echo "$tree"
}

fetch() {
    local tree=$1 package
    shift
    say "fetching $* of Debian $release (kept in $cache)"
    rm -rf --one-file-system "$cache"/.fetch-*
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
    mkdir "$work/tree"
    update
    (cd "$work" && apt-get "${APT[@]}" download -qq "$@" >&2) || die "cannot download $* of Debian $release"
    for package in "$work"/*.deb; do
        dpkg-deb --extract "$package" "$work/tree"
    done
    chmod 755 "$work/tree"
    mv --no-target-directory "$work/tree" "$tree"
}

update() {
    local archive
    archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
        'Origin: Debian' 'Label: Debian' 'Component: main' | head -n 1)
    [[ -n $archive ]] || die "apt's sources have no Debian to derive those of $release from"
    mkdir -p "$apt/lists/partial"
    echo "deb $archive $release main" >"$apt/sources.list"
    apt-get "${APT[@]}" update -qq >&2 || die "cannot read $release's packages from $archive"
}

say() {
    printf 'conformance: %s\n' "$*" >&2
}

die() {
    say "$*"
    exit 1
}

main "$@"
