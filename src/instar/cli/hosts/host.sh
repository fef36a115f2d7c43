#!/bin/sh
# Becomes one host that this machine plays. Started by local_host.py as the first process of new mount, uts, ipc, net and
# pid namespaces, which live as long as it does: when it is killed, every process of the host is, as in a power cut.
set -eu
directory=$1 runtime=$2 name=$3

# Held for life: a second starter finds that there is this host already.
exec 9>"$directory/init.lock"
flock -n 9 || exit 0

hostname "$name"
mount -t proc proc /proc
mount -t sysfs sysfs /sys # else libvirt and we see the network interfaces of the machine
ip link set lo up

# What others of this machine have under these names is not this host's.
rm -rf "$runtime"
mkdir -p -m 0711 "$runtime" "$runtime/netns" "$runtime/net" /run/netns /run/instar-net
umount -R -l /run/netns 2>/dev/null || :
mount --bind "$runtime/netns" /run/netns
mount --bind "$runtime/net" /run/instar-net
# The machine's service manager knows nothing of this host's processes: libvirtd must not ask it about them.
for manager in /run/systemd /run/dbus; do
    [ ! -d "$manager" ] || mount -t tmpfs -o mode=0755,size=1m tmpfs "$manager"
done

# Each start of the host is one of its own, as the kernel's is to a machine.
cat /proc/sys/kernel/random/uuid >"$runtime/boot-id"
mount --bind "$runtime/boot-id" /proc/sys/kernel/random/boot_id

# tini reaps; its last argument is how the host is found.
exec tini -- /bin/sh -c 'exec sleep infinity' "$directory"
