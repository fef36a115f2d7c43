# Loading kernel modules; sourced. The lists in /lib/instar/modules name modules in the order of their dependencies.

load_modules() {
    [ -f "/lib/instar/modules/$1" ] || return 0
    while read -r module; do
        [ -d "/sys/module/$module" ] || insmod "/lib/modules/$module.ko"
    done < "/lib/instar/modules/$1"
}

# $1: a virtio device's folder under /sys.
load_modules_for() {
    [ -r "$1/device" ] || return 0
    read -r kind < "$1/device"
    load_modules "virtio$((kind))"
}
