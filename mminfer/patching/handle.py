"""The patch on a user's model: put on, and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mminfer.config import InferenceConfig, checked_config
from mminfer.errors import ConfigError, InputError
from mminfer.forward.call_state import CallState
from mminfer.forward.host_check import check_host
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.turns import TurnLock, undone
from mminfer.models.wrappers import check_loaded, unwrapped
from mminfer.patching.model_pass import ModelPass
from mminfer.patching.replacement import Hanging


class PatchHandle(ModelPass):
    """A patched model: what was done since the patch was set, and the way back. `patch` makes it.

    Attributes:
        model: the patched model.
        adapter: how the model is read.
        config: the techniques in force.
        records: one `PromptRecord` for each prompt pass since the patch was set.
        prompt_ms: duration of each of those passes.
    """

    def __init__(
        self,
        model: Any,
        config: InferenceConfig,
        compile: bool = False,
        prefill_chunk_size: int | None = None,
        verify: bool = True,
    ) -> None:
        model = unwrapped(model)
        if checked_config(config).tower is not None:
            raise ConfigError(
                f"tower={config.tower}: the host's generate encodes pictures before it calls a patched model, so that "
                "nothing can leave ahead of the tower: use Engine(model, processor, config), or leave tower=None"
            )
        super().__init__(model, config, compile, prefill_chunk_size, verify)
        check_loaded(model)
        config.check_calibration(self.adapter)
        check_host(self.adapter, config, verify)
        config.warn_of_doubts(self.adapter.spec)
        self._host_state = {name: getattr(self.adapter.base, name) for name in self.adapter.host_state}
        self._turns = TurnLock()
        # A compiler that the caller has put around the model is not to look into the pass.
        self._hanging = Hanging(model, torch.compiler.disable(self.forward))

    @property
    def is_on(self) -> bool:
        """Whether the model runs our pass."""
        return self._hanging.replacement.active

    def forward(self, inputs: dict[str, Any]) -> Any:
        """As of `ModelPass`; threads take turns."""
        if self.model.training:
            raise InputError(
                "the patched model is in training mode, and a pass has neither dropout nor gradients: call eval() "
                "on the model, or undo() the patch to train it"
            )
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and embeds.requires_grad and torch.is_grad_enabled():
            raise InputError("inputs_embeds ask for gradients, which a pass does not give: undo() the patch for them")
        if self._turns.is_mine:  # a hook on a layer asks the model
            return super().forward(inputs)
        with self._turns.held():
            return super().forward(inputs)

    @property
    def _host_forward(self) -> Callable[..., Any]:
        return self._hanging.replacement.original

    def _prompt(self, call: CallState, inputs: dict[str, Any], cache: CompressedCache) -> Tensor:
        check_host(self.adapter, self.config, self._verify, self._host_forward)  # at once, if nothing has changed
        return super()._prompt(call, inputs, cache)

    def put_on(self) -> None:
        """Hangs the pass on the model; `undo` takes it down."""
        self._hanging.hang()

    def undo(self) -> None:
        """Gives the model back as it was. Calling it again does nothing.

        What others have put over the patch since, or in its place, stays, and calls the host's own `forward` then.
        """
        try:
            self._take_off()
        finally:  # once more, for an interrupt that came in between
            self._take_off()

    def _take_off(self) -> None:
        if not self.is_on:
            return
        for name, value in self._host_state.items():
            setattr(self.adapter.base, name, value)
        self._hanging.take_down()


def patch(
    model: Any,
    config: InferenceConfig,
    compile: bool = False,
    prefill_chunk_size: int | None = None,
    verify: bool = True,
) -> PatchHandle:
    """Makes a loaded Hugging Face vision-language model run with these techniques, in its own `generate`.

    `forward` of the instance is replaced, nothing else: no class, no weight, no global table. When rows leave the
    prompt (merging, pruning), `forward` returns logits of the last position only, [B, 1, vocabulary], as `generate`
    asks for; otherwise [B, N, vocabulary] as the host does.

    Args:
        model: a `...ForConditionalGeneration` of a supported family.
        config: the techniques; `InferenceConfig()` changes nothing but the way it is computed.
        compile: decode by the host's modules under torch.compile. The first token takes the time to compile, half a
            minute or more; where it fails, decoding goes on as without.
        prefill_chunk_size: tokens of each chat that go through the layers at a time, images never split; the cache is
            compressed behind each chunk. None: the whole prompt at once. Pixels are encoded as they come in the call;
            `Engine.generate` also takes them piece by piece.
        verify: whether to compare our pass with the host's own on a few tokens first, once for each loaded model.

    Returns:
        A handle; `undo()` gives the model back as it was.

    Raises:
        UnsupportedModelError: the family has no adapter, or our pass is not the host's own for this language model.
        ConfigError: a setting does not fit the model, it is patched already, or the config is none.

    Example:
        >>> handle = mminfer.patch(model, mminfer.InferenceConfig(cache=mminfer.LookM(budget=8192)))
        >>> ids = model.generate(**processor_inputs, max_new_tokens=64)
        >>> handle.records[-1].layers[0].entries  # how many entries a head each sequence's cache holds in layer 0
        >>> handle.undo()
    """
    handle = PatchHandle(model, config, compile, prefill_chunk_size, verify)
    try:
        handle.put_on()
    except BaseException:
        handle.undo()
        raise
    return handle


@contextmanager
def patched(
    model: Any,
    config: InferenceConfig,
    compile: bool = False,
    prefill_chunk_size: int | None = None,
    verify: bool = True,
) -> Iterator[PatchHandle]:
    """`patch` for the time of a `with` block; arguments, errors and handle are those of `patch`.

    Example:
        >>> with mminfer.patched(model, mminfer.InferenceConfig(merge=mminfer.AIMMerge(ratio=0.25))):
        ...     ids = model.generate(**processor_inputs, max_new_tokens=64)
    """
    handle = PatchHandle(model, config, compile, prefill_chunk_size, verify)
    with undone(handle.undo):
        handle.put_on()
        yield handle
