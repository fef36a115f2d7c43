"""Networks, subnets, ports and security groups: Network API v2.0."""
