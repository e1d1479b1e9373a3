"""Errors for users: one line that says what to do."""

from __future__ import annotations

import reprlib
import traceback
from pathlib import Path

_LONGEST = 700
_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


class RecipeError(ValueError):
    """An error that the user can correct; its text says how, in one line.

    Args:
        text: the text. Line breaks in it, which texts of other libraries and names that a user
            types may have, become spaces; what cannot be printed is escaped; the middle of an
            overlong text is left out.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Return a text as one line that any terminal can print, cut to some hundred characters."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return line


def describe(error: BaseException) -> str:
    """Describe an error of somebody else's code: its kind, its text and the place it came from."""
    text = one_line(str(error)).rstrip(".")
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{kind}{place}: {text}" if text else f"{kind}{place}"


def quote(name: object) -> str:
    """Return what a user typed in quotes, its middle left out if it is overlong."""
    return _SHORT.repr(str(name))
