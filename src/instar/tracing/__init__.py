"""Traces of what is done, over processes, where a collector is configured; the ids that log lines carry."""
