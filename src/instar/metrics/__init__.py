"""Numbers of a running process, in the form that Prometheus reads. Knows no other room: the others count into it."""
