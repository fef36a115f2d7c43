"""The process on a host: takes commands, fences stale ones, calls the hypervisor, reports."""
