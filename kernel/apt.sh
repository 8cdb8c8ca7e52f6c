# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# Sourced by build.sh: what the build needs from the distribution, through the
# machine's own apt set-up. Uses $cache, $SOURCE_PACKAGE and $BUILD_PACKAGES.

# Options that point apt at the backports, where they are needed.
apt_options=()

install_packages() {
    local missing=() package
    for package in "${BUILD_PACKAGES[@]}"; do
        compgen -G "/var/lib/dpkg/info/$package*.list" >/dev/null || missing+=("$package")
    done
    [[ ${#missing[@]} == 0 ]] && return
    say "installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 \
        install -qq -y --no-install-recommends "${missing[@]}" >"$cache/apt.log" 2>&1 ||
        die "cannot install ${missing[*]}: $(tail -n 3 "$cache/apt.log")"
}

# The version that apt offers. Asking takes half a second, so the answer is kept
# until apt's lists change.
source_version() {
    local kept=$cache/source-version
    if [[ ! -s $kept || /var/lib/apt/lists -nt $kept ]]; then
        find_source >"$kept.$BASHPID"
        mv "$kept.$BASHPID" "$kept"
    fi
    cat "$kept"
}

find_source() {
    rm -rf "$cache/apt"
    candidate && return
    say "updating apt's lists, which know no $SOURCE_PACKAGE"
    apt-get update -qq >&2 || true
    candidate && return
    say "looking for $SOURCE_PACKAGE in backports"
    add_backports
    candidate || die "apt offers no $SOURCE_PACKAGE, and neither do the backports: check apt's sources"
}

candidate() {
    apt-cache "${apt_options[@]}" policy "$SOURCE_PACKAGE" |
        sed -n 's/^  Candidate: \([^(]*\)$/\1/p' | grep .
}

# The backports come from wherever the release itself comes from, with lists of
# their own: the machine's set-up stays as it is.
add_backports() {
    local codename archive
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
        'Origin: Debian' "Codename: $codename" 'Component: main' | head -n 1)
    [[ -n $archive ]] || die "apt's sources have no Debian $codename to derive the backports from"
    mkdir -p "$cache/apt/lists/partial"
    echo "deb $archive $codename-backports main" >"$cache/apt/sources.list"
    use_backports
    apt-get "${apt_options[@]}" update -qq >&2 || die "cannot read $codename-backports from $archive"
}

use_backports() {
    apt_options=(-o "Dir::Etc::SourceList=$cache/apt/sources.list" -o Dir::Etc::SourceParts=-
        -o "Dir::State::Lists=$cache/apt/lists" -o "Dir::Cache=$cache/apt")
}

# The package itself, downloaded once and never installed.
source_deb() {
    local version=$1
    local deb=$cache/$SOURCE_PACKAGE-$version.deb
    if [[ ! -e $deb ]]; then
        say "downloading $SOURCE_PACKAGE $version"
        [[ ! -e $cache/apt/sources.list ]] || use_backports
        mkdir "$work/deb"
        (cd "$work/deb" &&
            apt-get "${apt_options[@]}" -o APT::Sandbox::User=root -qq download "$SOURCE_PACKAGE=$version") >&2 ||
            die "cannot download $SOURCE_PACKAGE $version"
        rm -f "$cache/$SOURCE_PACKAGE"-*.deb
        mv "$work"/deb/*.deb "$deb"
    fi
    echo "$deb"
}
