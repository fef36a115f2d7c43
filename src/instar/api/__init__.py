"""The OpenStack Compute API."""
