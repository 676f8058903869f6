"""What tests of evaluation share with those of the wiring: the tiny model, on a fixed machine."""

from app.conftest import free_memory, model

__all__ = ["free_memory", "model"]
