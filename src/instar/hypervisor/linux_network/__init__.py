"""Bridges, DHCP and packet filters on a Linux host."""
