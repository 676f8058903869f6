"""Descriptions of unexpected errors that hold no user data."""

import traceback

_FRAMES = 8


def fault(error: BaseException) -> str:
    """The type and innermost frames of an unexpected error, without its message.

    The messages of decoding and lookup errors quote their input, which may be a user's text.
    """
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    passed = " < ".join(
        f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}"
        for frame in reversed(frames)
    )
    return f"{type(error).__name__} at {passed or 'an unknown place'}"
