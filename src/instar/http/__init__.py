"""What every HTTP API of the cloud shares: request context, faults, paging."""
