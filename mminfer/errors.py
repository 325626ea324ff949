"""Every error a user can cause, and what they are warned of: each says what was found, what was wanted and the way out.

Of a value it says no more than a line: `shown` writes one as Python does, `shortened` takes a text as it is.
"""

from __future__ import annotations

import reprlib
from typing import Any

MOST = 200  # characters of a value in a message

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MOST
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = _repr.maxfrozenset = _repr.maxarray = 6


class MminferError(Exception):
    """Base class: catch it to tell a wrong request from a defect."""


class ConfigError(MminferError, ValueError):
    """A setting is out of range or does not fit the model."""


class UnsupportedModelError(MminferError):
    """The model's family, or a feature of this model, is not supported."""


class InputError(MminferError, ValueError):
    """The request itself is wrong: messages, images, videos, prompt or arguments."""


class UntrainedWarning(UserWarning):
    """A setting asks of the model what its configuration does not say that it was trained for."""


def shown(value: Any) -> str:
    """A value as Python writes it, shortened."""
    try:
        return shortened(_repr.repr(value))
    except Exception:  # an object's own `__repr__` raises anything
        return f"a {type(value).__name__}"


def shortened(text: Any) -> str:
    """A text of at most 200 characters, on one line and without control characters: of a longer one both ends."""
    line = str(text)
    if len(line) > MOST:
        line = f"{line[: MOST // 2 - 2]}...{line[-MOST // 2 + 2 :]}"
    if not line.isprintable():  # file names may hold bytes that are no text, and texts what a console obeys
        line = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= MOST else f"{line[: MOST - 3]}..."
