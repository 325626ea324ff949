"""Which host families are supported, and by which adapter: one line each."""

from __future__ import annotations

from typing import Any

from mminfer.errors import UnsupportedModelError, shown
from mminfer.models.adapter import ModelAdapter
from mminfer.models.gemma3 import Gemma3Adapter
from mminfer.models.idefics3 import Idefics3Adapter
from mminfer.models.internvl import InternVLAdapter
from mminfer.models.llava_next import LlavaNextAdapter
from mminfer.models.llava_onevision import LlavaOnevisionAdapter
from mminfer.models.pixtral import LlavaAdapter, Mistral3Adapter
from mminfer.models.qwen2_5_vl import Qwen25VLAdapter
from mminfer.models.qwen2_vl import Qwen2VLAdapter
from mminfer.models.qwen3_vl import Qwen3VLAdapter

ADAPTERS: dict[str, type[ModelAdapter]] = {
    "gemma3": Gemma3Adapter,
    "idefics3": Idefics3Adapter,
    "internvl": InternVLAdapter,
    "llava": LlavaAdapter,
    "llava_next": LlavaNextAdapter,
    "llava_onevision": LlavaOnevisionAdapter,
    "mistral3": Mistral3Adapter,
    "qwen2_5_vl": Qwen25VLAdapter,
    "qwen2_vl": Qwen2VLAdapter,
    "qwen3_vl": Qwen3VLAdapter,
    "smolvlm": Idefics3Adapter,
}


def supported_families() -> list[str]:
    """Host `model_type`s that have an adapter."""
    return sorted(ADAPTERS)


def check_family(model_type: str | None) -> None:
    """Raises `UnsupportedModelError`, which names the supported families, unless there is an adapter."""
    if model_type not in ADAPTERS:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; supported families: {', '.join(supported_families())}"
        )


def adapter_for(model: Any) -> ModelAdapter:
    """The adapter of a loaded host model.

    Raises:
        UnsupportedModelError: the family has no adapter, the object is not a generating vision-language model, or its
            language model is built in another way than the passes run it.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"the model is {shown(model)}, of type {type(model).__name__}: wanted a loaded ...ForConditionalGeneration "
            f"of transformers, of one of {', '.join(supported_families())}; Engine.from_pretrained(...) loads one"
        )
    check_family(model_type)
    if not hasattr(model, "lm_head") or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head: pass the ...ForConditionalGeneration model"
        )
    try:
        return ADAPTERS[model.config.model_type](model)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a language model that nobody thought of
        raise UnsupportedModelError(
            f"the language model of this {type(model).__name__} cannot be read: {str(error)[:200]}"
        ) from error
