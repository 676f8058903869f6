"""Settles what a server runs before anything starts: memory, first plan, and earlier state."""
