#!/usr/bin/env bash
# Makes this checkout ready to run: scripts/setup.sh demo | test
#
# demo: a virtual environment in .venv with the run-time packages. test: also the development packages and, as root on
# Debian or Ubuntu, the servers that tests start. A second run ends at once. Nothing here asks a question, starts or
# stops a service of the machine, or fails because a server could not be installed: its tests are then skipped by name.
# GPULANE_NO_APT=1 leaves the machine's own packages alone.
set -euo pipefail
cd "$(dirname "$0")/.."

WHAT=${1:-demo}
VENV=.venv
CACHE=.cache
APT_SECONDS=600
# Commands that tests start, each with the package that brings it. A non-root PATH often lacks the sbin folders.
SERVERS="nginx:nginx haproxy:haproxy redis-server:redis-server chromium:chromium ip:iproute2"
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

main() {
    case $WHAT in
        demo) lists=requirements.txt ;;
        test) lists=requirements-dev.txt ;;
        *) stop "usage: scripts/setup.sh demo | test" ;;
    esac
    one_at_a_time
    make_venv
    install_packages "$lists"
    if [ "$WHAT" = test ]; then install_servers; fi
}

say() { echo "setup: $*" >&2; }
stop() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

one_at_a_time() {
    mkdir -p $CACHE
    if has flock; then
        exec 9>$CACHE/setup.lock
        flock 9
    fi
}

# ---- Python ----

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
is_ready() { [ -x $VENV/bin/python ] && is_recent $VENV/bin/python && $VENV/bin/python -m pip --version >/dev/null 2>&1; }

find_python() {
    for name in python3.13 python3.12 python3.11 python3 python; do
        if has "$name" && is_recent "$name"; then
            echo "$name"
            return
        fi
    done
}

make_venv() {
    # A stamp that fits says that all this was looked at before, so that the usual start costs no Python process.
    if stamp_fits "$lists" || is_ready; then return; fi
    python=$(find_python)
    if [ -z "$python" ]; then
        apt_install python3 python3-venv || true
        python=$(find_python)
    fi
    if [ -z "$python" ]; then
        # Ubuntu 22.04's python3 is older, and a newer one stands beside it.
        apt_install python3.11 python3.11-venv || true
        python=$(find_python)
    fi
    [ -n "$python" ] || stop "Python 3.11 or newer is needed; install it and run this again"
    say "making $VENV with $("$python" --version)"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian keeps ensurepip in a package of its own, named after the version.
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        apt_install "python$version-venv" || apt_install python3-venv || true
    fi
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv --clear $VENV
    elif "$python" -m virtualenv --version >/dev/null 2>&1; then
        "$python" -m virtualenv --quiet --clear $VENV
    elif "$python" -c 'import pip, venv' 2>/dev/null; then
        "$python" -m venv --clear --without-pip $VENV
        "$python" -m pip --quiet --python $VENV/bin/python install pip
    elif has uv; then
        uv venv --quiet --clear --seed --python "$python" $VENV
    else
        stop "Python's venv module is missing; run 'apt-get install python$version-venv' as root and run this again"
    fi
}

# The stamp holds all that the installed packages depend on; the folder too, since the package is installed in place.
fingerprint() { { pwd; cat "$1" pyproject.toml; readlink -f $VENV/bin/python; } | sha256sum; }
stamp_fits() { [ -x $VENV/bin/python ] && [ "$(cat $VENV/.stamp-"$1" 2>/dev/null)" = "$(fingerprint "$1")" ]; }

install_packages() {
    if stamp_fits "$1"; then return; fi
    say "installing the packages of $1"
    # Compiling every module of every package would take longer than the few that are used.
    pip_install --no-compile -r "$1"
    pip_install --no-deps --no-build-isolation -e .
    fingerprint "$1" >$VENV/.stamp-"$1"
    if [ "$1" = requirements-dev.txt ]; then fingerprint requirements.txt >$VENV/.stamp-requirements.txt; fi
}

pip_install() {
    PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 $VENV/bin/python -m pip install --quiet "$@" \
        || stop "installing Python packages failed, see above"
}

# ---- servers ----

missing_packages() {
    for pair in $SERVERS; do
        if ! has "${pair%%:*}"; then echo "${pair##*:}"; fi
    done
}

install_servers() {
    missing=$(missing_packages | tr '\n' ' ')
    if [ -z "$missing" ]; then return; fi
    # After a failure (no network, no such package) the next try waits an hour, so that tests start quickly meanwhile.
    tried=$CACHE/servers-tried
    if [ -z "$(find $tried -mmin -60 2>/dev/null)" ]; then
        # shellcheck disable=SC2086
        apt_install $missing || for package in $missing; do apt_install "$package" || true; done
        missing=$(missing_packages | tr '\n' ' ')
        if [ -n "$missing" ]; then touch $tried; fi
    fi
    if [ -n "$missing" ]; then say "not here: ${missing% }; the tests that need them are skipped by name"; fi
}

may_apt() { [ "$(id -u)" = 0 ] && has apt-get && [ -z "${GPULANE_NO_APT:-}" ]; }

apt_install() {
    may_apt || return 1
    say "apt-get install $*"
    services_before=$(enabled_services)
    keep_services_off
    status=0
    apt_get install --no-install-recommends "$@" \
        || { update_once && apt_get install --no-install-recommends "$@"; } || status=1
    leave_no_policy
    disable_new_services "$services_before"
    if [ $status != 0 ]; then say "apt-get failed, its words are in $CACHE/apt.log"; fi
    return $status
}

# An image without package lists needs it; a second time it would bring nothing new.
updated=no
update_once() { [ $updated = no ] && updated=yes && apt_get update; }

apt_get() {
    DEBIAN_FRONTEND=noninteractive timeout $APT_SECONDS apt-get -y -qq -o DPkg::Lock::Timeout=60 -o Dpkg::Use-Pty=0 \
        -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 "$@" >$CACHE/apt.log 2>&1 9>&-
}

# Tests start servers of their own; the machine's must neither start now nor at the next boot.
POLICY=/usr/sbin/policy-rc.d
keep_services_off() {
    [ ! -e $POLICY ] || return 0
    trap leave_no_policy EXIT
    printf '#!/bin/sh\n# gpulane set-up: no service starts while its tests'"'"' servers are installed\nexit 101\n' >$POLICY
    chmod 755 $POLICY
}
leave_no_policy() { if grep -q 'gpulane set-up' $POLICY 2>/dev/null; then rm -f $POLICY; fi; }

enabled_services() {
    for name in nginx haproxy redis-server; do
        if has systemctl && systemctl --quiet is-enabled $name 2>/dev/null; then echo $name; fi
    done
}
disable_new_services() {
    for name in $(enabled_services); do
        case " $(echo "$1" | tr '\n' ' ') " in
            *" $name "*) ;; # it was there before us, so it is somebody's
            *) systemctl --quiet disable "$name" >/dev/null 2>&1 || true ;;
        esac
    done
}

main
