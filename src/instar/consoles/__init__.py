"""Consoles for browsers and terminals: noVNC's page, and the WebSocket that leads to a guest's screen or serial line."""
