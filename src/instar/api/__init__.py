"""The Compute API: routes, request schemas per microversion, views, policy. `app.py` makes the ASGI application."""
