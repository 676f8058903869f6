"""Faults of our own, told so that a log shows where and nothing of what was being handled."""

import traceback

_FRAMES = 8


def fault(error: BaseException) -> str:
    """The type of an unexpected error and the innermost lines it passed, without its message.

    Messages of decoding and lookup errors quote what they choked on, which may be a user's text.
    """
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    passed = " < ".join(
        f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}"
        for frame in reversed(frames)
    )
    return f"{type(error).__name__} at {passed or 'an unknown place'}"
