"""What stands in for a model's own `forward`: nothing else than that, and nothing any more once it is switched off."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from mminfer.errors import ConfigError

Forward = Callable[..., Any]


class Replacement:
    """Takes the calls of a model's `forward`, with its signature.

    Wherever it hangs once it is switched off, be it under the wrapper that somebody else put around it, it is the
    original. So are its copies from the start: a copied model has weights of its own.

    Args:
        original: the model's own `forward`.
        run: takes the inputs of a call by their names.

    Attributes:
        active: whether calls go to `run`.
    """

    # No dictionary: whoever wraps a function takes over what is in it.
    __slots__ = ("__name__", "__signature__", "__wrapped__", "_keywords", "_run", "active", "original")

    def __init__(self, original: Forward, run: Callable[[dict[str, Any]], Any]) -> None:
        self.original, self.active, self._run = original, True, run
        self.__wrapped__, self.__name__ = original, getattr(original, "__name__", "forward")
        self.__signature__ = inspect.signature(original)
        parameters = self.__signature__.parameters.values()
        self._keywords = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        if not args and self._keywords:  # as `generate` calls; binding takes long for one token
            return self._run(kwargs)
        bound = self.__signature__.bind(*args, **kwargs).arguments
        return self._run({**bound.pop(self._keywords, {}), **bound})

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        original: Forward = copy.deepcopy(self.original, memo)
        return original

    def __reduce__(self) -> tuple[Callable[[Forward], Forward], tuple[Forward]]:
        return _itself, (self.original,)


def _itself(forward: Forward) -> Forward:
    return forward


class Hanging:
    """A replacement on a model: `forward` of the instance, and what copies of the instance take along.

    Args:
        model: the host's.
        run: takes the inputs of a call by their names.
    """

    def __init__(self, model: Any, run: Callable[[dict[str, Any]], Any]) -> None:
        self._model = model
        self._own = vars(model).get("forward")  # None: the class's
        self.replacement = Replacement(model.forward, run)
        self._state = self._state_for_copies  # one object, to be known again

    def hang(self) -> None:
        _hanging[self._model] = ref(self)
        vars(self._model)["__getstate__"] = self._state
        vars(self._model)["forward"] = self.replacement

    def take_down(self) -> None:
        """May be called at any time; what others put over or under it stays."""
        attributes = vars(self._model)
        for name in [name for name, value in attributes.items() if value is self.replacement]:
            if name == "forward" and self._own is None:
                attributes.pop(name, None)
            else:  # accelerate keeps a forward that it wraps under another name
                attributes[name] = self.replacement.original
        if attributes.get("__getstate__") is self._state:
            attributes.pop("__getstate__", None)
        self.replacement.active = False

    def _of_the_class(self) -> dict[str, Any]:
        kind: Any = type(self._model)
        state: dict[str, Any] = kind.__getstate__(self._model)
        return state

    def _state_for_copies(self) -> dict[str, Any]:
        """What copying and pickling take for the model's state: that of a model without the patch."""
        state = self._of_the_class()
        state = {name: value for name, value in state.items() if value is not self._state}
        for name in [name for name, value in state.items() if value is self.replacement]:
            if name == "forward" and self._own is None:
                del state[name]
            else:
                state[name] = self.replacement.original
        return state


_hanging: WeakKeyDictionary[nn.Module, ref[Hanging]] = WeakKeyDictionary()


def is_patched(model: nn.Module) -> bool:
    """Whether there is a patch on the model, be it under what others have put over it."""
    hanging = _hanging[model]() if model in _hanging else None
    return hanging is not None and hanging.replacement.active


def check_unpatched(model: nn.Module) -> None:
    """Raises `ConfigError` if there is a patch on the model."""
    if is_patched(model):
        raise ConfigError("the model is patched already: call undo() on that patch first")
