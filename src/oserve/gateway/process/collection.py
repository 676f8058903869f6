"""Garbage collection, tuned for a process that passes on streams."""

import gc

# Requests leave next to no cycles; at the default threshold a full collection would interrupt all
# streams several times a second.
_ALLOCATIONS = 50_000


def rare_collections() -> None:
    """Exempt what is loaded by now from collection, and collect seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, 20, 50)
