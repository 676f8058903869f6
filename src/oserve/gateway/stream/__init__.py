"""Answers on their way from a replica to a client: read, passed through, kept, continued."""
