"""The Compute API: routes, request schemas per microversion, views, policy. `service.py` puts it together."""
