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
    echo $$ >"$runtime/serve.pid" # should the reaper be killed: we go on without, and are found by this
    # libvirtd asks a QEMU without a guest what it is able to do; killed meanwhile, it leaves it behind for ever.
    end_asked() {
        for file in /var/lib/libvirt/qemu/qmp-*/qmp.pid; do
            [ -e "$file" ] || continue
            read -r pid <"$file" || continue
            if tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF "$file"; then kill -9 "$pid" || :; fi
            rm -rf "${file%/*}"
        done
    }
    # A guest in whose start libvirtd was killed has its state without a process: the next one (seen with 9.0) would hold a
    # job on it for ever, and keep every call that meets it waiting. It has not run yet: it is off, as if never started.
    forget_unborn() {
        for state in "$runtime"/run/qemu/*.xml; do
            grep -qs "<domstatus [^>]*pid='0'" "$state" || continue
            name=${state##*/} name=${name%.xml}
            pid=$(cat "${state%.xml}.pid" 2>/dev/null) || pid=none # libvirt ends the file without a newline
            if tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "guest=$name,"; then kill -9 "$pid" || :; fi
            rm -f "$state" "${state%.xml}.pid"
        done
    }
    # The reaper ends with this script: it must see to it that libvirtd ends first.
    trap '[ -z "$daemon" ] || kill "$daemon" 2>/dev/null || :; [ -z "$daemon" ] || wait "$daemon" || :; exit 0' TERM INT
    while :; do
        while [ -e "$runtime/held" ]; do sleep 0.1; done
        end_asked
        forget_unborn
        libvirtd -p "$runtime/run/libvirtd.pid" 9>&- &
        daemon=$!
        wait "$daemon" || :
        daemon=
        sleep 0.2
    done
    ;;
esac
