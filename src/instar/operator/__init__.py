"""The operators' view of a running cloud, over HTTP: hosts, audit, operations, and diagrams of what really happened."""
