"""The libvirt hypervisor: guests of one host as QEMU domains. The agent opens `driver.LibvirtHypervisor`."""
