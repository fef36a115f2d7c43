#!/bin/sh
# Sets up everything that Instar needs, and starts nothing: Debian packages that are missing, a virtual environment in
# .venv, the pinned Python packages, and Instar itself in it. Called by make; may be called again at any time, and is done
# at once when nothing has changed. As root, or as a user who may use sudo for apt-get.
#
#   packaging/install.sh [run|distributed|dev]
#     run: what the program, the demo and the first session need; distributed: PostgreSQL and RabbitMQ too; dev: the tests too
set -eu
cd "$(dirname "$0")/.."
profile=${1:-run}
case $profile in
run | distributed) lock=requirements-demo.txt ;;
dev) lock=requirements-dev.txt ;;
*)
    echo "usage: packaging/install.sh [run|distributed|dev]" >&2
    exit 2
    ;;
esac

say() { echo "install: $*" >&2; }

# --- host packages -----------------------------------------------------------------------------------------------------

wanted_packages() {
    while read -r name _; do
        case $name in
        '' | '#'* | files:*) ;;
        systemd:*) [ ! -d /run/systemd/system ] || echo "${name#systemd:}" ;;
        distributed:*) [ "$profile" = run ] || echo "$name" ;;
        *) echo "$name" ;;
        esac
    done <packaging/host-packages.txt
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        say "root is needed for: $*"
        exit 1
    fi
}

if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
    missing=
    missing_quiet=
    for wanted in $(wanted_packages); do
        package=${wanted#distributed:}
        status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || :)
        [ "$status" != installed ] || continue
        if [ "$package" = "$wanted" ]; then missing="$missing $package"; else missing_quiet="$missing_quiet $package"; fi
    done
    if [ -n "$missing$missing_quiet" ]; then
        say "installing Debian packages:$missing$missing_quiet"
        as_root apt-get -q -o DPkg::Lock::Timeout=300 update </dev/null
    fi
    # shellcheck disable=SC2086 - lists of names
    if [ -n "$missing" ]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
            install --no-install-recommends $missing </dev/null
    fi
    # shellcheck disable=SC2086
    [ -z "$missing_quiet" ] || as_root packaging/install-quietly.sh $missing_quiet
else
    say "this is no Debian: see packaging/host-packages.txt for what the machine must have"
fi

# Debian's libvirtd looks for this account when it starts, whoever its guests run as. The service's package makes it; a
# machine without a service manager has only the program, so the account is made here, as that package would.
if command -v libvirtd >/dev/null && ! getent passwd libvirt-qemu >/dev/null; then
    say "making the account libvirt-qemu"
    for group in kvm libvirt-qemu; do
        getent group $group >/dev/null || as_root groupadd --system $group
    done
    as_root useradd --system --gid kvm --groups libvirt-qemu --home-dir /var/lib/libvirt --no-create-home --shell /usr/sbin/nologin libvirt-qemu
fi

# --- Python ------------------------------------------------------------------------------------------------------------

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=
for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || {
    say "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3"
    exit 1
}

if [ ! -x .venv/bin/python ] || ! is_new_enough .venv/bin/python; then
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi

# --- files of packages that are not installed ----------------------------------------------------------------------------

fetch_files() {
    folder=$(mktemp -d)
    # As whoever we are: apt's own user cannot write into a folder of ours. Signatures are checked all the same.
    (cd "$folder" && apt-get -q -o APT::Sandbox::User= download "$1" && dpkg-deb -x ./*.deb tree) >"$folder/log" 2>&1 &&
        mkdir -p .venv/share && cp -R "$folder/tree/usr/share/$1" .venv/share/
    status=$?
    rm -rf "$folder"
    return $status
}

for package in $(sed -n 's/^files:\([^ ]*\).*/\1/p' packaging/host-packages.txt); do
    if [ -e ".venv/share/$package" ] || [ -e "/usr/share/$package" ]; then continue; fi
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || continue
    say "fetching the files of Debian package $package"
    fetch_files "$package" || { as_root apt-get -q -o DPkg::Lock::Timeout=300 update </dev/null >/dev/null 2>&1 && fetch_files "$package"; } ||
        say "$package could not be fetched; everything else goes on without it"
done

# What this environment was made from. The tests' packages contain those of the program.
fingerprint() {
    { .venv/bin/python --version && pwd && cat "$1" pyproject.toml; } | sha256sum | cut -d' ' -f1
}
stamp=.venv/.installed
[ "$profile" = dev ] || profile=run # of Python packages, one process and many need the same
if grep -qsx "dev $(fingerprint requirements-dev.txt)" $stamp || grep -qsx "$profile $(fingerprint $lock)" $stamp; then
    exit 0
fi
say "installing Python packages from $lock"
rm -f $stamp
.venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r "$lock"
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
echo "$profile $(fingerprint $lock)" >$stamp
say "done"
