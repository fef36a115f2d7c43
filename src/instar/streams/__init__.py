"""Bytes between hosts: files and unix sockets, agent to agent, authenticated, encrypted, resumable, without ssh.

`server.StreamServer` gives out what was granted by name to a peer's certificate; `client.StreamClient` fetches and joins.
Every stream is one TLS 1.3 connection with a thread of its own at each side: reading, hashing and encrypting gigabytes
leaves the event loop alone, and a thread is ended by shutting its sockets (`cut.Cut`).
"""
