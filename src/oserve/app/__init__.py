"""App: wiring. Everything is built here, once, and nothing is decided here."""
