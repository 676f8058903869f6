"""Garbage collection, tuned for a process that forwards streams."""

import gc

# Requests create few reference cycles. At the default threshold a full collection would interrupt
# all streams several times a second.
_ALLOCATIONS = 50_000


def rare_collections() -> None:
    """Exclude all objects that exist now from collection, and collect rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, 20, 50)
