"""`instar demo`: a real guest through its life, by OpenStack's own SDK, in a cloud that is there for the demo only."""
