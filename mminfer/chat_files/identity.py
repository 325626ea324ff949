"""What made a chat, and whether it can go on here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mminfer.chat_files.digests import settings_digest, template_digest, tokenizer_digest, weights_digest
from mminfer.config import InferenceConfig
from mminfer.errors import InputError, shortened, shown
from mminfer.models.adapter import ModelAdapter

FILE_FORMAT = 5  # since the heads of a cache may hold different numbers of entries
_OTHERS = {
    "model": "load it with a model of the same geometry and dtype",
    "weights": "load it with the checkpoint that made it, with the same adapters",
    "model_settings": "load it with the model's config as it was",
    "tokenizer": "load it with the tokenizer that made it",
    "template": "load it with the chat template that made it",
    "config": "load it with an engine of the same techniques",
}


@dataclass(frozen=True)
class ChatIdentity:
    """What a saved chat must have in common with the engine that takes it up.

    Args:
        adapter: how the model is read.
        processor: the model's.
        config: the techniques.
    """

    adapter: ModelAdapter
    processor: Any
    config: InferenceConfig

    @property
    def geometry(self) -> str:
        """Tells models apart whose caches do not fit each other."""
        return f"{self.adapter.spec} {self.adapter.model.dtype}"

    @cached_property
    def _text(self) -> dict[str, str]:
        tokenizer = self.processor.tokenizer
        return {"tokenizer": tokenizer_digest(tokenizer), "template": template_digest(self.processor)}

    def facts(self) -> dict[str, Any]:
        """What the file says, as JSON has it; of the weights as they are now.

        Raises:
            InputError: a setting of a technique has no place in JSON.
        """
        facts = {
            "format": FILE_FORMAT,
            "model": self.geometry,
            "weights": weights_digest(self.adapter.model),
            "model_settings": settings_digest(self.adapter.text_config),
            **self._text,
            "config": self._config(),
        }
        try:
            plain: dict[str, Any] = json.loads(json.dumps(facts))
        except (TypeError, ValueError) as error:
            raise InputError(f"config {shown(self.config)}: its settings have no place in JSON ({error})") from error
        return plain

    def _config(self) -> dict[str, Any]:
        """The techniques; files from before there was a stage ahead of the tower do not name it."""
        return {stage: value for stage, value in self.config.to_dict().items() if stage != "tower" or value is not None}

    def check(self, found: dict[str, Any]) -> None:
        """Whether a chat of these facts can go on here.

        Raises:
            InputError: it cannot.
        """
        for name, value in self.facts().items():
            if found.get(name) != value:
                theirs = f"its {name} is {shortened(found.get(name))}, this engine's {shortened(value)}"
                raise InputError(f"{theirs}: {_OTHERS.get(name, 'load it where it fits')}")

    @property
    def takes_dtype(self) -> torch.dtype | None:
        """The type of keys and values; None where the model's own does not tell."""
        model = self.adapter.model
        return None if getattr(model, "quantization_method", None) is not None else model.dtype

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        return int(self.adapter.model.get_input_embeddings().weight.shape[0])

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the entries of a cache."""
        cache = self.config.cache
        return ("keys", "values", *(() if cache is None else cache.columns))

    @property
    def by_head(self) -> bool:
        """Whether heads may differ in length, and entries have log-masses."""
        return self.config.cache is not None and self.config.cache.by_head
