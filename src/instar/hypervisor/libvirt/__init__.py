"""Guests through libvirt and QEMU."""
