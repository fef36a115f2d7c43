"""Users, projects, roles and tokens: Identity API v3."""
