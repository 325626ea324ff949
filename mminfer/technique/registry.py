"""Every technique class that was defined, by name: the library's own, and those of its users."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mminfer.errors import ConfigError

if TYPE_CHECKING:
    from mminfer.technique.stages import Technique

_classes: dict[str, type[Technique]] = {}
_homes: dict[str, tuple[str, str]] = {}  # where each was defined


class TechniqueRegistry(Mapping[str, "type[Technique]"]):
    """Technique classes by name; new ones appear as soon as they are defined.

    They come in the order of their stages, baselines behind the others of a stage, the library's before others.

    A class registers itself when it is defined. Abstract classes and those whose name begins with an underscore are
    left out, since no configuration can name them.

    Example:
        >>> from mminfer.config import TECHNIQUES
        >>> TECHNIQUES["LookM"](budget=8192)
    """

    def __getitem__(self, name: str) -> type[Technique]:
        found = _classes[name]
        if inspect.isabstract(found):
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        found = [(name, technique) for name, technique in _classes.items() if not inspect.isabstract(technique)]
        return iter([name for name, _ in sorted(found, key=lambda pair: _rank(pair[1]))])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def register(technique: type[Technique]) -> None:
    """Makes a class known by its name.

    Raises:
        ConfigError: another class has that name. Defining the same class again, as a notebook does, replaces it.
    """
    name = technique.__name__
    if name.startswith("_"):
        return
    home = _home(technique)
    if _homes.setdefault(name, home) != home:
        raise ConfigError(
            f"a technique named {name} is defined already, in {_classes[name].__module__}: configurations and saved "
            "chats name techniques by their class, so give this one another name"
        )
    _classes[name] = technique


def is_registered(technique: type[Technique]) -> bool:
    """Whether configurations know this very class by its name."""
    return _classes.get(technique.__name__) is technique


def is_bundled(technique: type[Technique]) -> bool:
    """Whether a technique comes with the library."""
    return technique.__module__.startswith("mminfer.")


def _rank(technique: type[Technique]) -> tuple[int, bool, bool, str]:
    """By what techniques are sorted; it does not depend on which module was loaded first."""
    stages = list(type(technique.stage))
    return stages.index(technique.stage), technique.baseline, not is_bundled(technique), technique.__module__


def _home(technique: type[Technique]) -> tuple[str, str]:
    """The file, or the module where there is none, and the name in it: a file may run and be imported as well."""
    module = technique.__module__
    return getattr(sys.modules.get(module), "__file__", None) or module, technique.__qualname__
