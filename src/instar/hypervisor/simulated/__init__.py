"""Thousands of hosts in one process, with set latencies and faults."""
