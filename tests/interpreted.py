"""Triton's interpreter in half the time: it makes its language over at every call of a jitted function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def language_made_over_once_a_launch() -> Iterator[None]:
    """Functions that a kernel calls find the language as the kernel has it: walking through it anew changes nothing.

    Only where the interpreter has been loaded, and is as we know it.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    known = ("_patch_lang", "_LangPatchScope", "GridExecutor", "tl")
    if interpreter is None or not all(hasattr(interpreter, name) for name in known):
        yield
        return
    make_over, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules: dict[Callable[..., Any], frozenset[str]] = {}
    done: set[frozenset[str]] = set()

    def once(fn: Callable[..., Any]) -> Any:
        if fn not in modules:
            language = interpreter.tl, interpreter.tl.core
            modules[fn] = frozenset(x.__name__ for x in fn.__globals__.values() if any(x is part for part in language))
        if modules[fn] in done:
            return interpreter._LangPatchScope()
        done.add(modules[fn])
        return make_over(fn)

    def anew(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            done.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter.GridExecutor, "__call__", anew)
        yield
