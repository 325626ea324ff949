"""What errors say of values: never more than a line of them."""

from __future__ import annotations

import reprlib
from typing import Any

MOST = 200  # characters of a value in a message

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MOST
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = _repr.maxfrozenset = _repr.maxarray = 6


def shown(value: Any) -> str:
    """A value as Python writes it, shortened."""
    try:
        return shortened(_repr.repr(value))
    except Exception:  # an object's own `__repr__` raises anything
        return f"a {type(value).__name__}"


def shortened(text: Any) -> str:
    """A text of at most 200 characters, all of which any console can print: of a longer one both ends."""
    line = str(text)
    if len(line) > MOST:
        line = f"{line[: MOST // 2 - 2]}...{line[-MOST // 2 + 2 :]}"
    line = line.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no text
    return line if len(line) <= MOST else f"{line[: MOST - 3]}..."
