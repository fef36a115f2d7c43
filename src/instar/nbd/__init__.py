"""Disks served by NBD: processes of qemu-storage-daemon, which outlive who started them. Below volumes and hypervisors."""
