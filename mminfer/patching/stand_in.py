"""A model to call in place of the user's: same modules and weights, but a `forward` and notes of its own."""

from __future__ import annotations

import copy
from typing import Any

from mminfer.config import InferenceConfig
from mminfer.models.encoder_cache import EncoderCache
from mminfer.patching.model_pass import ModelPass
from mminfer.patching.replacement import Replacement


class StandIn(ModelPass):
    """A pass that hangs on nobody's model: what an engine calls in place of its model, for one call.

    The user's model is not touched: whoever calls it meanwhile, in this thread or another, gets the host's answer. What
    the host's `generate` writes down on a model goes to the stand-in, too.

    Args:
        model: the host's; not patched.
        config: the techniques.
        compile: decode by the host's modules under torch.compile.
        verify: as of `ModelPass`.
        encoder_cache: likewise.

    Attributes:
        model: the model to call.
    """

    def __init__(
        self,
        model: Any,
        config: InferenceConfig,
        compile: bool = False,
        verify: bool = True,
        encoder_cache: EncoderCache | None = None,
    ) -> None:
        super().__init__(model, config, compile, verify=verify, encoder_cache=encoder_cache)
        self.model = _shallow(model)
        if self.adapter.base is not model:
            modules = self.model.__dict__["_modules"] = dict(model._modules)
            name = next(name for name, module in modules.items() if module is self.adapter.base)
            modules[name] = _shallow(self.adapter.base)
        vars(self.model)["forward"] = Replacement(model.forward, self.forward)


def _shallow(module: Any) -> Any:
    """A module with attributes of its own that are the same objects."""
    return copy.copy(module)
