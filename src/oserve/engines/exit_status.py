"""What an exit status says, in words."""

import signal


def ending(status: int) -> str:
    """How a process ended; a negative status is a signal."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"
