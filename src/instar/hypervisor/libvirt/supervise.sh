#!/bin/sh
# Keeps one private libvirtd running, as a service manager would. Started by private_daemon.py in a mount namespace of
# its own: first `supervise.sh mount …`, which gives libvirtd's fixed places a private content and becomes the reaper,
# then `supervise.sh serve …` under it. The reaper (tini as child subreaper) outlives libvirtd: guests become its
# children, so that the process of a guest that ends does not stay a zombie, which libvirtd would take for alive.
set -eu
action=$1 base=$2 runtime=$3

case $action in
mount)
    # Held by the reaper for its life: a starter that died before it could write the pid is not doubled by the next.
    exec 9>"$runtime/reaper.lock"
    flock -n 9 || exit 0
    mkdir -p /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt
    mount --bind "$runtime/run" /run/libvirt
    mount --bind "$base/lib" /var/lib/libvirt
    mount --bind "$base/cache" /var/cache/libvirt
    mount --bind "$base/log" /var/log/libvirt
    mount --bind "$base/etc" /etc/libvirt
    echo $$ >"$runtime/reaper.pid"
    exec tini -s -- /bin/sh "$0" serve "$base" "$runtime"
    ;;
serve)
    daemon=
    # libvirtd asks a QEMU without a guest what it is able to do; killed meanwhile, it leaves it behind for ever.
    end_asked() {
        for file in /var/lib/libvirt/qemu/qmp-*/qmp.pid; do
            [ -e "$file" ] || continue
            read -r pid <"$file" || continue
            if tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF "$file"; then kill -9 "$pid" || :; fi
            rm -rf "${file%/*}"
        done
    }
    # The reaper ends with this script: it must see to it that libvirtd ends first.
    trap '[ -z "$daemon" ] || kill "$daemon" 2>/dev/null || :; [ -z "$daemon" ] || wait "$daemon" || :; exit 0' TERM INT
    while :; do
        end_asked
        while [ -e "$runtime/held" ]; do sleep 0.1; done
        libvirtd -p "$runtime/run/libvirtd.pid" 9>&- &
        daemon=$!
        wait "$daemon" || :
        daemon=
        sleep 0.2
    done
    ;;
esac
