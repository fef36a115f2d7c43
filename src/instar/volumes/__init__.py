"""Volumes: what the lifecycle needs of them."""
