"""One new token of each sequence through all layers of a standard decoder and its head, in one call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mminfer_kernels.backends import cpu_takes
from mminfer_kernels.checks import check_number, check_tensors, check_whole, described
from mminfer_kernels.decode_step import reference
from mminfer_kernels.decode_step.caches import LayerCache, PackedLayerCache, Segments, check_caches
from mminfer_kernels.dispatch import register, resolve

__all__ = ["DecoderWeights", "LayerCache", "LayerWeights", "PackedLayerCache", "Segments", "decode_step"]

WORDS = 16  # sizes must be multiples of this: the widest vector, so that no loop has a remainder
MAX_ROWS = 16  # beyond, a matrix product that packs its operands is faster


class LayerWeights(NamedTuple):
    """One pre-norm layer: attention, then a gated FFN with SiLU. Matrices are [out, in]; norms over the head are [D].

    The order is that of the C struct.
    """

    input_norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    post_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


OPTIONAL_WEIGHTS = ("q_norm", "k_norm", *(name for name in LayerWeights._fields if name.endswith("_bias")))


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """The layers of a decoder and its head, by reference.

    Args:
        layers: in order.
        norm: [C], the final norm.
        head: [vocabulary, C].
        heads: query heads H.
        groups: key and value heads G.
        head_dim: D.
        eps: of all RMS norms.
        scale: factor of the attention's logits.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    heads: int
    groups: int
    head_dim: int
    eps: float
    scale: float

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_layers()
        queries, keys, hidden, inner = self.heads * self.head_dim, self.groups * self.head_dim, *self.sizes
        wanted: tuple[tuple[int, ...], ...] = (
            (hidden,), (queries, hidden), (queries,), (keys, hidden), (keys,), (keys, hidden), (keys,),
            (hidden, queries), (hidden,), (self.head_dim,), (self.head_dim,), (hidden,),
            (inner, hidden), (inner,), (inner, hidden), (inner,), (hidden, inner), (hidden,),
        )  # fmt: skip
        if self.norm.shape != (hidden,) or self.head.dim() != 2 or self.head.shape[1] != hidden:
            raise ValueError(f"norm is {list(self.norm.shape)}, head {list(self.head.shape)}, wanted width {hidden}")
        for i, layer in enumerate(self.layers):
            for name, tensor, shape in zip(LayerWeights._fields, layer, wanted, strict=True):
                if tensor is not None and tuple(tensor.shape) != shape:
                    raise ValueError(f"layer {i}: {name} is {list(tensor.shape)}, wanted {shape}")

    def _check_numbers(self) -> None:
        for name in ("heads", "groups", "head_dim"):
            check_whole(name, getattr(self, name), least=1)
        if self.heads % self.groups or self.head_dim % 2:
            raise ValueError(
                f"{self.heads} query heads of {self.head_dim} elements for {self.groups} key heads, wanted a multiple "
                "and an even number of elements"
            )
        check_number("eps", self.eps, least=0)
        check_number("scale", self.scale)

    def _check_layers(self) -> None:
        if not self.layers or any(not isinstance(layer, LayerWeights) for layer in self.layers):
            raise ValueError(f"layers are {described(self.layers)}, wanted one LayerWeights or more")
        check_tensors({"norm": self.norm, "head": self.head})
        for layer in self.layers:
            named = layer._asdict()
            optional = {name: named.pop(name) for name in OPTIONAL_WEIGHTS}
            check_tensors({"norm": self.norm, **named}, optional)
        if self.layers[0].gate.dim() != 2 or 0 in self.layers[0].gate.shape:
            raise ValueError(f"layer 0: gate is {list(self.layers[0].gate.shape)}, wanted [intermediate, hidden]")

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """Hidden size and intermediate size."""
        inner, hidden = self.layers[0].gate.shape
        return hidden, inner

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there are."""
        of_layers = (tensor for layer in self.layers for tensor in layer if tensor is not None)
        return (*of_layers, self.norm, self.head)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that a step reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @functools.cached_property
    def held(self) -> DecoderWeights:
        """The same memory under names of its own: it stays, whatever becomes of the parameters."""
        layers = [LayerWeights._make(None if x is None else x.detach() for x in layer) for layer in self.layers]
        return replace(self, layers=tuple(layers), norm=self.norm.detach(), head=self.head.detach())

    @functools.cached_property
    def pointers(self) -> ctypes.Array[ctypes.c_int64]:
        """The layers' addresses, as the C struct has them; 0 for what there is not."""
        words = [0 if tensor is None else tensor.data_ptr() for layer in self.held.layers for tensor in layer]
        return (ctypes.c_int64 * len(words))(*words)

    @functools.cached_property
    def fits_native(self) -> bool:
        """Whether the C++ step can read them: float32, dense, on the CPU, in sizes it has no remainders for."""
        dense = all(t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu" for t in self.tensors)
        return dense and all(size % WORDS == 0 for size in (*self.sizes, self.head_dim))


register("decode_step", "reference", reference.decode_step)
register("decode_step", "native", "mminfer_kernels.decode_step.native:decode_step", cpu_takes)


def decode_step(
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: DecoderWeights,
    caches: Sequence[LayerCache | PackedLayerCache],
    backend: str = "auto",
) -> Tensor:
    """Runs one token a row through all layers and the head, and writes its keys and values into the caches.

    It is no `torch.library` op: whoever watches (torch.compile, a FLOP counter) is better served by the host's modules.

    Args:
        hidden_states: [B, C].
        cos, sin: [B, D], rows of any stride: the rotation of each row's token.
        weights: of the layers.
        caches: one a layer, padded or packed; the new entry is written behind what is there.
        backend: "auto", "native" or "reference".

    Returns:
        Logits [B, vocabulary].

    Raises:
        ValueError: shapes or dtypes that do not fit.
        TypeError: weights or caches that are none.
        BackendError: an explicit backend that is not there.
        MemoryError: there was none for scratch.
    """
    check_tensors({"hidden_states": hidden_states, "cos": cos, "sin": sin})
    if not isinstance(weights, DecoderWeights):
        raise TypeError(f"weights is {type(weights).__name__}, wanted DecoderWeights")
    if not isinstance(caches, (list, tuple)):
        raise TypeError(f"caches is {type(caches).__name__}, wanted a list of LayerCache")
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states is {list(hidden_states.shape)}, wanted [B, {weights.sizes[0]}]")
    batch, table = hidden_states.shape[0], (hidden_states.shape[0], weights.head_dim)
    if hidden_states.shape != (batch, weights.sizes[0]) or cos.shape != table or sin.shape != table:
        raise ValueError(
            f"hidden_states {list(hidden_states.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}: wanted "
            f"[B, {weights.sizes[0]}] and twice [B, {weights.head_dim}]"
        )
    if len(caches) != len(weights.layers):
        raise ValueError(f"{len(caches)} caches for {len(weights.layers)} layers")
    check_caches(hidden_states, weights, caches)
    _, run = resolve("decode_step", backend, hidden_states, cos, sin)
    return run(hidden_states, cos, sin, weights, caches)
