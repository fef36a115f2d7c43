#!/bin/sh
# Installs Debian packages of which the programs alone are wanted: their services do not start, now or with the next start of
# the machine, and PostgreSQL makes no cluster. What forbids it stands for the time of the installation only; a policy that
# the machine has already stays as it is. Called by install.sh, as root, after `apt-get update`.
#
#   packaging/install-quietly.sh PACKAGE…
set -eu
policy=/usr/sbin/policy-rc.d
cluster=/etc/postgresql-common/createcluster.d/instar-install.conf
our_policy=

tidy() {
    rm -f "$cluster"
    [ -z "$our_policy" ] || rm -f "$policy"
}
trap tidy EXIT
trap 'exit 130' INT TERM HUP

is_installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null || :)" = installed ]; }

# Services that come with what is missing. Those that the machine has already are none of our business.
services=
for pair in postgresql:postgresql rabbitmq-server:rabbitmq-server erlang-base:epmd; do
    is_installed "${pair%:*}" || services="$services ${pair#*:}"
done

if [ ! -e $policy ]; then
    our_policy=yes
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
fi
mkdir -p "${cluster%/*}"
echo "create_main_cluster = false" >"$cluster"

DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
    install --no-install-recommends "$@" </dev/null

for service in $services; do
    for unit in "$service.socket" "$service.service"; do
        if [ -e "/lib/systemd/system/$unit" ] && command -v systemctl >/dev/null; then systemctl --quiet disable "$unit" || :; fi
    done
    [ ! -e "/etc/init.d/$service" ] || update-rc.d "$service" disable || :
done
