"""Tests of switches share one machine and one model."""

from machines import cpu_flags, free_memory, model

__all__ = ["cpu_flags", "free_memory", "model"]
