"""What a host's language model does to embeddings before its first layer: read by running just that, once a model."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mminfer.errors import UnsupportedModelError
from mminfer.models.structure import running_device

_scales: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


class _Entered(Exception):
    """The first layer was reached.

    Args:
        hidden: [B, N, C], what it was given.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def embedding_scale(language_model: Any, hidden_size: int) -> float:
    """By what the language model multiplies embeddings before its first layer (Granite, Gemma); 1.0 for most.

    Args:
        language_model: the host's; its own `forward` is run up to the first layer, on two made-up embeddings.
        hidden_size: C.

    Raises:
        UnsupportedModelError: it does something else to them, such as adding positions or normalising.
    """
    found = _scales.get(language_model)
    if found is None:
        found = _scales[language_model] = _read_scale(language_model, hidden_size)
    return found


def _read_scale(language_model: Any, hidden_size: int) -> float:
    device = running_device(language_model.get_input_embeddings())
    probe = torch.linspace(0.5, 2.0, 2 * hidden_size, dtype=torch.float32, device=device).view(1, 2, hidden_size)
    hidden = _at_first_layer(language_model, probe)
    if hidden.shape == probe.shape:
        scale = float(hidden.flatten()[0].double() / probe.flatten()[0].double())
        if torch.allclose(hidden.double(), probe.double() * scale, rtol=1e-2):
            return 1.0 if torch.equal(hidden.to(probe), probe) else scale
    raise UnsupportedModelError(
        f"{type(language_model).__name__} changes embeddings before its first layer by more than a factor, which the "
        "prompt pass would leave out: use a model whose layers take the embeddings as they are"
    )


def _at_first_layer(language_model: Any, embeds: Tensor) -> Tensor:
    """[1, 2, C], what the first layer is given for these embeddings."""
    return entering_states(language_model, lambda: language_model(inputs_embeds=embeds, use_cache=False))


@torch.no_grad()
def entering_states(language_model: Any, run: Callable[[], object]) -> Tensor:
    """[B, N, C], what the first layer of a language model is given while something runs, which ends there.

    Args:
        language_model: the host's.
        run: calls it, or a model around it.

    Raises:
        UnsupportedModelError: it fails before, or never comes there.
    """
    thread = get_ident()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:  # a pass of somebody else's goes on
            raise _Entered(args[0] if args else kwargs["hidden_states"])

    handle = language_model.layers[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except _Entered as entered:
        return entered.hidden
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(language_model).__name__} cannot be read: the host's own forward up to its first layer failed with "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    finally:
        handle.remove()
    raise UnsupportedModelError(f"{type(language_model).__name__}: its forward never calls its first layer")
