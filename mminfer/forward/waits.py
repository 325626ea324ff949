"""Work that waits for the GPU, told as it runs: it could not be recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What must know values on the host before it can go on.
WAITING = frozenset({"_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero"})
WAITING |= {"unique_consecutive", "unique_dim"}
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})


class Unwaiting(TorchDispatchMode):
    """Within it, `RuntimeError` is raised where the host would wait for the GPU or hand it values, by the op's name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device for x in given if x.dim() or x.device.type != "cpu"}
        wanted = kwargs.get("device")
        if given and wanted is not None:
            devices.add(torch.device(wanted))
        waits = name in WAITING or len({device.type for device in devices}) > 1
        waits |= name in _INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        if waits:
            raise RuntimeError(f"{name} waits for the GPU")
        return func(*args, **kwargs)
