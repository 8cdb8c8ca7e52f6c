#!/usr/bin/env bash
# Builds the programs by which the OCI validates runtimes (`validation/` of its
# runtime-tools), which the suite `oci` runs. They are made from the
# distribution's source package with the distribution's Go and libraries.
#
#   conformance/validation/build.sh
#
# Prints the path of a folder with `programs/` and, beside it, what they look for
# in their working directory. It is kept in the cache under a hash of what went
# into it, so that only the first call fetches and builds.
set -euo pipefail

readonly PACKAGE=golang-github-opencontainers-runtime-tools
# Whatever this machine's release is: then the tests are everywhere the same. Of
# bookworm's own package mirrors were seen that lack the archive.
readonly RELEASE=trixie
readonly MODULE=github.com/opencontainers/runtime-tools

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${RUNVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/runvm}/validation

# Lists of our own for the release's sources, from wherever this machine fetches
# Debian: the machine's set-up stays as it is. apt's own user cannot write here.
readonly APT=(-o "Dir::Etc::SourceList=$cache/apt/sources.list" -o Dir::Etc::SourceParts=-
    -o "Dir::State::Lists=$cache/apt/lists" -o "Dir::Cache=$cache/apt" -o APT::Sandbox::User=root)

main() {
    local version tools
    mkdir -p "$cache"
    # One at a time: a second caller waits and finds the result.
    exec {lock}>"$cache/lock"
    flock "$lock"
    version=$(source_version)
    tools=$cache/$(inputs "$version" | sha256sum | cut -c1-16)
    [[ -d $tools ]] || build "$version" "$tools"
    echo "$tools"
}

inputs() {
    echo "$1"
    cat "$here/build.sh" "$here/tap.go"
    dpkg-query --show 'golang-*'
}

# The version that the release has. It is asked for once: a release's packages stay.
source_version() {
    local kept=$cache/source-version
    if [[ ! -s $kept ]]; then
        update
        apt-cache "${APT[@]}" showsrc "$PACKAGE" | sed -n 's/^Version: //p' | sort --version-sort | tail -n 1 >"$kept"
    fi
    grep . "$kept" || die "Debian $RELEASE has no source package $PACKAGE"
}

update() {
    local archive
    archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
        'Origin: Debian' 'Label: Debian' 'Component: main' | head -n 1)
    [[ -n $archive ]] || die "apt's sources have no Debian to derive those of $RELEASE from"
    mkdir -p "$cache/apt/lists/partial"
    echo "deb-src $archive $RELEASE main" >"$cache/apt/sources.list"
    apt-get "${APT[@]}" update -qq >&2 || die "cannot read $RELEASE's sources from $archive"
}

# apt checks the archive against the release's signed list.
download() {
    (cd "$1" && apt-get "${APT[@]}" source -qq --tar-only "$PACKAGE=$2" >&2)
}

build() {
    local version=$1 tools=$2 source
    say "building $PACKAGE $version (kept in $cache)"
    rm -rf --one-file-system "$cache"/.build-*
    work=$(mktemp -d "$cache/.build-XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
    mkdir -p "$work"/{archive,tools/programs} "$work/go/src/github.com/mndrix/tap-go"
    [[ -e $cache/apt/sources.list ]] || update
    download "$work/archive" "$version" || { update && download "$work/archive" "$version"; } ||
        die "cannot download the source of $PACKAGE $version"

    source=$work/go/src/$MODULE
    mkdir -p "$source"
    tar --extract --file "$work"/archive/*.orig.tar.* --strip-components 1 --directory "$source"
    # The one library that the distribution lacks.
    cp "$here/tap.go" "$work/go/src/github.com/mndrix/tap-go"
    compile "$source" "$work/tools"
    cp "$source/rootfs-amd64.tar.gz" "$work/tools"
    mv --no-target-directory "$work/tools" "$tools"
}

compile() {
    local source=$1 tools=$2
    export GO111MODULE=off GOFLAGS='' GOPATH=$work/go:/usr/share/gocode GOCACHE=$work/go-cache
    (
        cd "$source"
        go build -o "$tools/programs/" ./validation/... &&
            # It runs in containers that have no library.
            CGO_ENABLED=0 go build -o "$tools/runtimetest" ./cmd/runtimetest
    ) >&2 || die "the build failed; its messages are above"
}

say() {
    printf 'conformance: %s\n' "$*" >&2
}

die() {
    say "$*"
    exit 1
}

main
