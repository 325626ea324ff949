"""A GPU that is none: tensors that say they are on it, compute on the CPU, and whose launches and waits are counted.

What runs on them takes the ways that it would take on a GPU, since tensors say "cuda" to whoever asks; the values are
right, so that lengths, quotas and branches are those of a real pass. Kernels of ours are recorded, not run.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from mminfer_kernels import dispatch, launching
from mminfer_kernels.backends import interpreted
from mminfer_kernels.dispatch import registered_ops
from mminfer_kernels.launching import recorded_launches
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mminfer.forward.waits import WAITING

GPU = torch.device("cuda", 0)
CARD = SimpleNamespace(multi_processor_count=132)  # what kernels ask of it
# Kernels that torch launches for these, about, where it is not one.
LAUNCHES = {
    "_unique2": 8,
    "bincount": 4,
    "cumsum": 2,
    "masked_select": 4,
    "nonzero": 3,
    "sort": 3,
    "topk": 3,
    "unique_consecutive": 6,
    "unique_dim": 8,
}
FREE = frozenset({"alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "_unsafe_view"})
FREE |= {"_local_scalar_dense", "new_empty_strided", "_reshape_alias"}
# What may be given tensors of the CPU beside those of the GPU; all others only numbers, tensors without dimensions.
MIXING = frozenset({"copy", "copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"})
OURS = (f"{os.sep}mminfer{os.sep}", f"{os.sep}mminfer_kernels{os.sep}")


class PretendedTensor(torch.Tensor):
    """Says that it is on the GPU; its values are those of `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> PretendedTensor:
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.shape, real.stride(), real.storage_offset(), dtype=real.dtype, device=GPU
        )
        made.held = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of a pretended GPU")

    def tolist(self) -> Any:  # torch's own takes no subclass
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.held!r})"


@dataclass
class Counts:
    """What a stretch of work asked of the GPU.

    Attributes:
        launches: kernels, by the op that launched them.
        waits: how often the host waited for the GPU, by place and op.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    launched_at: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()


class PretendedGPU(TorchDispatchMode):
    """Within it, tensors may be moved to "cuda", and what happens there is counted.

    Attributes:
        counts: since the last `fresh`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    @contextmanager
    def fresh(self) -> Iterator[Counts]:
        """Counts of a `with` block alone."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mminfer":
            return self._own(func, args, kwargs)
        device = kwargs.get("device")
        on_gpu = _is_gpu(device) or any(isinstance(x, PretendedTensor) for x in tree_leaves((args, kwargs)))
        if not on_gpu:
            return func(*args, **kwargs)
        _check_devices(func, args, kwargs)
        self._count(func, args, kwargs)
        placed = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
        out = func(*_real(args), **_real(placed))
        return _written(func, args, kwargs, out if device is not None and not _is_gpu(device) else _on_gpu(out))

    def _own(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One of our ops: its launches as on a GPU, its values as on the CPU."""
        plain = OPDEFS[func._schema.name]._init_fn
        if not any(isinstance(x, PretendedTensor) for x in tree_leaves((args, kwargs))):
            return plain(*args, **kwargs)
        with recorded_launches() as launches, self:
            plain(*args, **kwargs)
        name = plain.__name__
        self.launch(name, len(launches))
        with mock.patch.object(launching, "interpreted", interpreted):  # values are the interpreter's
            return _written(func, args, kwargs, _on_gpu(plain(*_real(args), **_real(kwargs))))

    def wait(self) -> None:
        """The host waits for all that was launched."""
        self.counts.waits[_place(), "synchronize"] += 1

    def launch(self, name: str, count: int) -> None:
        """Counts kernels."""
        self.counts.launches[name] += count
        self.counts.launched_at[_place(), name] += count

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._schema.name.partition("::")[2].removesuffix("_")
        name = func._schema.name.partition("::")[2] if name == "" else name
        waits = 0
        if name in WAITING:
            waits += 1
        if name in ("copy", "_to_copy"):
            waits += self._count_copy(name, args, kwargs)
        elif name.strip("_") in ("index", "index_put", "index_put_impl", "unsafe_index"):
            waits += self._count_indices(args)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            waits += 1
        if waits:
            self.counts.waits[_place(), name] += waits
        nothing = name in ("fill", "zero") and args[0].numel() == 0
        if name not in FREE and not func.is_view and name not in ("copy", "_to_copy") and not nothing:
            self.launch(name, LAUNCHES.get(name, 1))

    def _count_copy(self, name: str, args: Any, kwargs: Any) -> int:
        """A copy between host and GPU waits, unless it is told not to; one on the GPU is a launch."""
        if name == "copy":
            ends = [isinstance(x, PretendedTensor) for x in args[:2]]
            patient = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source = isinstance(args[0], PretendedTensor)
            device = kwargs.get("device")
            ends = [source, source if device is None else _is_gpu(device)]
            patient = not kwargs.get("non_blocking", False)
        if args[0].numel() == 0:
            return 0
        if ends[0] == ends[1]:
            self.launch(name, 1)
            return 0
        return int(patient or (name == "_to_copy" and ends[0]))

    def _count_indices(self, args: Any) -> int:
        """An index on the host is copied; one of booleans is turned into places, whose number the host must know."""
        waits = 0
        for index in args[1]:
            if index is None:
                continue
            if not isinstance(index, PretendedTensor):
                waits += int(isinstance(args[0], PretendedTensor))
            if index.dtype in (torch.bool, torch.uint8):
                if len(args) > 2 and args[2].numel() == 1:  # filled where the mask is true
                    continue
                waits += 1
                self.launch("nonzero", LAUNCHES["nonzero"])
        return waits


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Raises `RuntimeError`, as a GPU would, where tensors of the CPU stand beside some that are not."""
    name = func._schema.name.partition("::")[2]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    elsewhere = [x for x in given if not isinstance(x, PretendedTensor) and x.dim()]
    if elsewhere and len(elsewhere) < len(given) and name not in MIXING:
        raise RuntimeError(f"{name}: expected all tensors on the same device, {list(elsewhere[0].shape)} is on the CPU")


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _real(tree: Any) -> Any:
    return tree_map_only(PretendedTensor, lambda x: x.held, tree)


def _on_gpu(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x if isinstance(x, PretendedTensor) else PretendedTensor(x), tree)


def _written(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """The outputs, but those that are arguments which were written into as these arguments."""
    schema = func._schema
    if not any(r.alias_info is not None and r.alias_info.is_write for r in schema.returns):
        return out
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    written = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return written[0] if len(schema.returns) == 1 else tuple(written)


def _place() -> str:
    """The innermost line of ours on the stack, or else the innermost of the host library."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in OURS):
            return f"{Path(name).parent.name}/{Path(name).name}:{frame.f_lineno}"
        if not other and "transformers" in name:
            other = f"transformers/{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "caller"


def _attention_counted(gpu: PretendedGPU) -> Callable[..., Tensor]:
    """torch's attention, which would ask the GPU's driver how to run: one launch."""
    plain = nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], PretendedTensor):
            return plain(*args, **kwargs)
        gpu.launch("scaled_dot_product_attention", 1)
        with torch.utils._python_dispatch._disable_current_modes():
            return PretendedTensor(plain(*_real(args), **_real(kwargs)))

    return attention


def _load_kernels() -> None:
    """So that none is made within the block, for a GPU, that others would then run interpreted."""
    for op in registered_ops():
        for backend in dispatch._registry[op].values():
            if "triton" in str(backend.source):
                backend.function  # noqa: B018


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """A `with` block in which "cuda" is there. Kernels are those of a GPU, be they interpreted elsewhere or not."""
    _load_kernels()
    gpu, lifted = PretendedGPU(), torch._C._only_lift_cpu_tensors()
    with (
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: CARD),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: gpu.wait()),
        mock.patch.object(launching, "interpreted", lambda: False),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention_counted(gpu)),
        gpu,
    ):
        torch._C._ensureCUDADeviceGuardSet()  # without a GPU one that does nothing
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)


def moved(model: nn.Module) -> nn.Module:
    """The model, all of its weights on the pretended GPU from now on."""
    for module in model.modules():
        tensors: Mapping[str, Any]
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = PretendedTensor(x.detach())  # type: ignore[index]
    return model
