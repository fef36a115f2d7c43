"""A whole cloud of many processes on this one machine: `instar distributed up`, its demo, tests and benches."""
