"""Tensor operations the techniques are built from: each a plain PyTorch reference and faster equals of it."""

from mminfer_kernels.best_match import best_match
from mminfer_kernels.build import prepare
from mminfer_kernels.column_mass import column_mass, power_iterate
from mminfer_kernels.decode_attention import decode_attention, packed_decode_attention
from mminfer_kernels.decode_step import (
    DecoderWeights,
    LayerCache,
    LayerWeights,
    PackedLayerCache,
    Segments,
    decode_step,
)
from mminfer_kernels.dispatch import (
    BackendError,
    available_backends,
    backend_for,
    backends_used,
    note_backend,
    record_backends,
    registered_ops,
)
from mminfer_kernels.fit_masses import fit_masses
from mminfer_kernels.k_centres import k_centres
from mminfer_kernels.merge_rows import merge_rows
from mminfer_kernels.packed_prompt_attention import packed_prompt_attention
from mminfer_kernels.prompt_attention import prompt_attention, prompt_attention_mass, prompt_attention_peak
from mminfer_kernels.regions import COSINE_ROUNDING, grow_regions, row_dots
from mminfer_kernels.replay_attention import replay_attention
from mminfer_kernels.rotary import apply_rotary, rotary, rotary_, rotary_table
from mminfer_kernels.rows import add_rows, gather_rms_norm, gather_rows, swiglu
from mminfer_kernels.top_places import top_places

OPS = registered_ops()

__all__ = [
    "COSINE_ROUNDING",
    "OPS",
    "BackendError",
    "DecoderWeights",
    "LayerCache",
    "LayerWeights",
    "PackedLayerCache",
    "Segments",
    "add_rows",
    "apply_rotary",
    "available_backends",
    "backend_for",
    "backends_used",
    "best_match",
    "column_mass",
    "decode_attention",
    "decode_step",
    "fit_masses",
    "gather_rms_norm",
    "gather_rows",
    "grow_regions",
    "k_centres",
    "merge_rows",
    "note_backend",
    "packed_decode_attention",
    "packed_prompt_attention",
    "power_iterate",
    "prepare",
    "prompt_attention",
    "prompt_attention_mass",
    "prompt_attention_peak",
    "record_backends",
    "replay_attention",
    "rotary",
    "rotary_",
    "rotary_table",
    "row_dots",
    "swiglu",
    "top_places",
]
