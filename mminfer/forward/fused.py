"""Which host layers the fused decode step may stand in for: standard ones that nobody has changed or hooked."""

from __future__ import annotations

from typing import Any

from mminfer_kernels import DecoderWeights, LayerWeights
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from mminfer.models.base import ModelAdapter

# Layers whose forward is that of `mminfer_kernels.decode_step`; their attention, FFN and norms stand in the same file.
LAYERS = frozenset(
    f"transformers.models.{place}.{name}DecoderLayer"
    for place, name in {
        "llama.modeling_llama": "Llama",
        "mistral.modeling_mistral": "Mistral",
        "qwen2.modeling_qwen2": "Qwen2",
        "qwen2_vl.modeling_qwen2_vl": "Qwen2VL",
        "qwen2_5_vl.modeling_qwen2_5_vl": "Qwen2_5_VL",
        "qwen3.modeling_qwen3": "Qwen3",
        "qwen3_vl.modeling_qwen3_vl": "Qwen3VLText",
    }.items()
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
LINEAR = {*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in FFN)}
HEAD = "lm_head"
HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}
NORMS = {"input_layernorm", "post_attention_layernorm"}
OTHERS = {"", "self_attn", "mlp", "mlp.act_fn"}


def fused_weights(adapter: ModelAdapter) -> DecoderWeights | None:
    """The host's layers as the C++ step takes them, weights by reference; None where it must not stand in for them."""
    if adapter.spec.sliding_layers or not all(_is_standard(layer) for layer in adapter.layers):
        return None
    norm, head, place = adapter.language_model.norm, adapter.model.lm_head, type(adapter.layers[0]).__module__
    if type(adapter).logits is not ModelAdapter.logits or not _is_own("norm", norm, place):
        return None
    if not _is_own(HEAD, head, place) or head.bias is not None:
        return None
    spec, attention = adapter.spec, adapter.layers[0].self_attn
    eps = {module.variance_epsilon for layer in adapter.layers for module in _norms(layer)} | {norm.variance_epsilon}
    if len(eps) != 1 or {layer.self_attn.scaling for layer in adapter.layers} != {attention.scaling}:
        return None
    layers = tuple(_weights(layer) for layer in adapter.layers)
    try:
        heads, groups = spec.num_attention_heads, spec.num_key_value_heads
        ends = norm.weight, head.weight
        weights = DecoderWeights(layers, *ends, heads, groups, spec.head_dim, eps.pop(), attention.scaling)
    except ValueError:  # sharded over devices
        return None
    plain = all(type(tensor.data) is Tensor for tensor in weights.tensors)
    return weights if plain and weights.fits_native else None


def hooks_of(adapter: ModelAdapter) -> list[Any]:
    """All dictionaries in which somebody may leave a forward hook on what a step runs through."""
    everywhere = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
    parts = [*adapter.layers, adapter.language_model.norm, adapter.model.lm_head]
    modules = [module for part in parts for module in part.modules()]
    return everywhere + [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _is_standard(layer: nn.Module) -> bool:
    """Whether the layer and all that is in it are the host's own classes, with their own forward."""
    modules, kind = dict(layer.named_modules()), type(layer)
    if f"{kind.__module__}.{kind.__name__}" not in LAYERS:
        return False
    if not LINEAR | NORMS | OTHERS <= modules.keys() <= LINEAR | NORMS | OTHERS | HEAD_NORMS:
        return False
    return not layer.training and all(_is_own(name, module, kind.__module__) for name, module in modules.items())


def _is_own(name: str, module: nn.Module, place: str) -> bool:
    kind = type(module)
    if "forward" in module.__dict__ or kind.forward.__module__ != kind.__module__:
        return False  # replaced on the module (accelerate, kernels) or on the class
    if name in LINEAR or name == HEAD:
        return kind is nn.Linear
    if name == "mlp.act_fn":
        return kind.__name__ in ("SiLU", "SiLUActivation")
    return kind.__module__ == place


def _norms(layer: Any) -> list[Any]:
    attention = layer.self_attn
    head = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return [layer.input_layernorm, layer.post_attention_layernorm, *head]


def _weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, o = ((x.weight, x.bias) for x in (getattr(attention, name) for name in ATTENTION))
    gate, up, down = ((x.weight, x.bias) for x in (getattr(mlp, name) for name in FFN))
    over_head = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    first, second = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return LayerWeights._make([first, *q, *k, *v, *o, *over_head, second, *gate, *up, *down])
