"""Instar: a compute cloud in one Python package."""

__version__ = "0.2.0"
