"""What a canary comes to, and whether it comes to the same again.

Text and whole numbers are to be equal. Other numbers are to be near: processors, instruction sets and builds of torch
round differently, and where two entries of a cache are all but equally good, one of them may take the other's place.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mminfer.errors import shown

Outcome = Mapping[str, Any]  # by quantity: a number, a text, or lists of these
NEAR = 0.002  # of the value, and of one
KERNELS, BY_KERNELS = "kernels", "flops"  # what scores and choices take depends on the kernels that ran


def differences(was: Outcome, now: Outcome) -> list[str]:
    """What is another one now, in words."""
    if was.get(KERNELS) != now.get(KERNELS):
        was, now = ({k: v for k, v in x.items() if k not in (KERNELS, BY_KERNELS)} for x in (was, now))
    return list(_differences(was, now))


def _differences(was: Any, now: Any, of: str = "") -> Iterator[str]:
    """Of a part.

    Args:
        was: the part.
        now: the same now.
        of: where it stands.
    """
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*was, *now)):
            yield from _differences(was.get(name), now.get(name), f"{of}.{name}" if of else name)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for place, pair in enumerate(zip(was, now, strict=True)):
            yield from _differences(*pair, f"{of}[{place}]")
    elif not _same(was, now):
        yield f"{of} was {shown(was)}, is {shown(now)}"


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, float) and isinstance(now, (int, float)):
        return abs(was - now) <= NEAR * (1 + abs(was))
    return bool(was == now)
