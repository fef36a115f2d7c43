"""Servers: everything below `/servers`."""
