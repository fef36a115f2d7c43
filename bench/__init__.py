"""Measurements of DESIGN's numbers. `make bench` prints them as a table, each beside its budget; none is a test."""
