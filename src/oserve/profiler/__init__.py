"""Measures steps of running engines and fits the profiles that plans are computed from."""
