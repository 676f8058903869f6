"""App: wires the server together, and decides nothing."""
