"""Choosing a host: host state, filters, weighers, claims, and the reason for every no."""
