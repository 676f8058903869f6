"""Access: API keys, their tenants and roles, limits, and the audit log."""
