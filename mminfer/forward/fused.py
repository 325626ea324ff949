"""Which host layers the fused decode step may stand in for: standard ones that nobody has changed or hooked."""

from __future__ import annotations

from typing import Any

from mminfer_kernels import DecoderWeights, LayerWeights
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from mminfer.models.adapter import ModelAdapter

# Layers whose forward is that of `mminfer_kernels.decode_step`; their attention, FFN and norms stand in the same file.
STANDARD_LAYERS = frozenset(
    f"transformers.models.{file}.{family}DecoderLayer"
    for file, family in {
        "llama.modeling_llama": "Llama",
        "mistral.modeling_mistral": "Mistral",
        "qwen2.modeling_qwen2": "Qwen2",
        "qwen2_vl.modeling_qwen2_vl": "Qwen2VL",
        "qwen2_5_vl.modeling_qwen2_5_vl": "Qwen2_5_VL",
        "qwen3.modeling_qwen3": "Qwen3",
        "qwen3_vl.modeling_qwen3_vl": "Qwen3VLText",
    }.items()
)
# The names of a layer's modules: which projections, norms and others it must have, and which norms it may have.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
LINEAR = {*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in FFN)}
NORMS = {"input_layernorm", "post_attention_layernorm"}
REQUIRED = LINEAR | NORMS | {"", "self_attn", "mlp", "mlp.act_fn"}
HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}
OUTPUT_HEAD = "lm_head"


def fused_weights(adapter: ModelAdapter) -> DecoderWeights | None:
    """The host's layers as the C++ step takes them, weights by reference; None where it must not stand in for them."""
    if adapter.spec.sliding_layers or not all(_is_standard(layer) for layer in adapter.layers):
        return None
    if not _has_standard_output(adapter):
        return None
    first, spec, norm = adapter.layers[0].self_attn, adapter.spec, adapter.language_model.norm
    eps = {norm.variance_epsilon, *(x.variance_epsilon for layer in adapter.layers for x in _norms(layer))}
    if len(eps) != 1 or {layer.self_attn.scaling for layer in adapter.layers} != {first.scaling}:
        return None
    layers = tuple(_layer_weights(layer) for layer in adapter.layers)
    output = norm.weight, adapter.model.lm_head.weight
    try:
        heads = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        weights = DecoderWeights(layers, *output, *heads, eps.pop(), first.scaling)
    except ValueError:  # sharded over devices
        return None
    all_plain = all(type(tensor.data) is Tensor for tensor in weights.tensors)
    return weights if all_plain and weights.fits_native else None


def hook_dictionaries(adapter: ModelAdapter) -> list[Any]:
    """All dictionaries in which anybody may leave a forward hook on the modules that a step runs through."""
    of_all_modules = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
    modules = [module for part in adapter.step_modules for module in part.modules()]
    return of_all_modules + [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _is_standard(layer: nn.Module) -> bool:
    """Whether the layer and all that is in it are the host's own classes, with their own forward."""
    modules, kind = dict(layer.named_modules()), type(layer)
    if f"{kind.__module__}.{kind.__name__}" not in STANDARD_LAYERS:
        return False
    if not REQUIRED <= modules.keys() <= REQUIRED | HEAD_NORMS:
        return False
    return not layer.training and all(_is_unchanged(name, x, kind.__module__) for name, x in modules.items())


def _has_standard_output(adapter: ModelAdapter) -> bool:
    """Whether the final norm and the head are the host's own, and all there is behind the layers."""
    file, head = type(adapter.layers[0]).__module__, adapter.model.lm_head
    if type(adapter).logits is not ModelAdapter.logits or not _is_unchanged("norm", adapter.language_model.norm, file):
        return False
    return _is_unchanged(OUTPUT_HEAD, head, file) and head.bias is None


def _is_unchanged(name: str, module: nn.Module, file: str) -> bool:
    """Whether the module of this name is of the class that the host's file gives it, with that class's forward."""
    kind = type(module)
    if "forward" in module.__dict__ or kind.forward.__module__ != kind.__module__:
        return False  # replaced on the module (accelerate, kernels) or on the class
    if name in LINEAR or name == OUTPUT_HEAD:
        return kind is nn.Linear
    if name == "mlp.act_fn":
        return kind.__name__ in ("SiLU", "SiLUActivation")
    return kind.__module__ == file


def _norms(layer: Any) -> list[Any]:
    attention = layer.self_attn
    of_heads = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]


def _layer_weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, o = ((x.weight, x.bias) for x in (getattr(attention, name) for name in ATTENTION))
    gate, up, down = ((x.weight, x.bias) for x in (getattr(mlp, name) for name in FFN))
    head_norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    before_attention, before_ffn = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return LayerWeights._make([before_attention, *q, *k, *v, *o, *head_norms, before_ffn, *gate, *up, *down])
