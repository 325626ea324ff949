"""The engine: a model, its processor and a config; messages in, answers and figures out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from mminfer_kernels import record_backends
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mminfer import nano
from mminfer.cache.kv_cache import CACHE_NAME, ROOM, CompressedCache
from mminfer.chat import Chat
from mminfer.config import InferenceConfig
from mminfer.errors import InputError, UnsupportedModelError
from mminfer.metrics.memory import peak_memory
from mminfer.metrics.stats import CallTimes, stats_of
from mminfer.models.registry import adapter_for, check_family
from mminfer.patching import PatchHandle, patched
from mminfer.request import GenerationOutput, build_inputs, cap_video, is_batch, normalise_messages
from mminfer.streaming import TextStream

MOST_ROOM = 1024  # beyond, a cache grows when the tokens come
MEDIA_OPTIONS = ("allow_remote", "num_frames", "fps", "max_video_tokens")
_locks: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()  # engines may share a model


class Engine:
    """Runs a Hugging Face vision-language model with the techniques of a config. The model stays as it is.

    Args:
        model: a `...ForConditionalGeneration` of a supported family.
        processor: its processor.
        config: the techniques; None: all off.
        compile: decode by the host's modules under torch.compile; see `mminfer.patch`.

    Raises:
        UnsupportedModelError: the family has no adapter.
        ConfigError: a setting does not fit the model.
    """

    def __init__(
        self, model: nn.Module, processor: Any, config: InferenceConfig | None = None, compile: bool = False
    ) -> None:
        self.model: Any = model.eval()
        self.processor = processor
        self.adapter = adapter_for(model)
        self.config = config if config is not None else InferenceConfig()
        self.config.check(self.adapter.spec)
        self.compile = compile
        self._lock = _locks.setdefault(self.model, Lock())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str = nano.NANO,
        config: InferenceConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        **hf_kwargs: Any,
    ) -> Engine:
        """Loads a model and its processor by the host library; safetensors only.

        Args:
            name_or_path: a checkpoint's folder or hub name, or "nano" for the bundled model.
            config: the techniques; None: all off.
            device: default the GPU if there is one, else the CPU.
            dtype: default float32 on the CPU, the checkpoint's own on a GPU.
            compile: decode by the host's modules under torch.compile; see `mminfer.patch`.
            hf_kwargs: passed on to the host's `from_pretrained` (`device_map`, `revision`, `trust_remote_code`, ...).

        Raises:
            UnsupportedModelError: the family has no adapter; nothing was loaded.
            InputError: there is no such checkpoint.
            ConfigError: a setting does not fit the model.
        """
        path = str(nano.checkpoint_path()) if name_or_path == nano.NANO else name_or_path
        shared = {k: hf_kwargs[k] for k in ("revision", "token", "cache_dir", "trust_remote_code") if k in hf_kwargs}
        device = _device(device)
        dtype = _dtype(dtype, device)
        try:
            model_config = AutoConfig.from_pretrained(path, **shared)
            check_family(model_config.model_type)
            check_before_loading(model_config, config)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                path, dtype=dtype, use_safetensors=True, **hf_kwargs
            )
            processor = AutoProcessor.from_pretrained(path, **shared)
        except OSError as error:
            raise InputError(f"no model, or no whole one, at {name_or_path!r}: {error}") from error
        except KeyError as error:
            raise UnsupportedModelError(f"{name_or_path}: {error}") from error
        return cls(model if "device_map" in hf_kwargs else model.to(device=device), processor, config, compile)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def supports_video(self) -> bool:
        """Whether the host's processor takes videos; else their frames go in as images."""
        return getattr(self.processor, "video_processor", None) is not None

    def generate(
        self,
        messages: Any,
        max_new_tokens: int = 64,
        *,
        allow_remote: bool = False,
        num_frames: int = 8,
        fps: float | None = None,
        max_video_tokens: int | None = None,
        **generation_kwargs: Any,
    ) -> GenerationOutput | list[GenerationOutput]:
        """Answers one chat, or a list of chats in one batch.

        Args:
            messages: a chat (a list of messages with text, image and video parts, or just a string) or a list of chats.
            max_new_tokens: tokens to generate at most.
            allow_remote: whether image URLs may be fetched.
            num_frames: frames taken of each video file, evenly spread.
            fps: take so many frames a second instead.
            max_video_tokens: visual tokens of one video at most; frames are left out, evenly, until they fit.
            generation_kwargs: the host's: `do_sample`, `temperature`, `stop_strings`, `num_beams`, `streamer`, ...

        Returns:
            One output, or a list for a list (with `num_return_sequences=n`, n outputs for each chat in turn).

        Raises:
            InputError: the request is wrong. The engine goes on with the next one.
        """
        start = time.perf_counter()
        chats = messages if is_batch(messages) else [messages]
        media: dict[str, Any] = {"allow_remote": allow_remote, "num_frames": num_frames, "fps": fps}
        inputs = self.prepare(chats, max_video_tokens=max_video_tokens, **media)
        outputs = self.run(inputs, start, max_new_tokens=max_new_tokens, **generation_kwargs)
        return outputs if is_batch(messages) or len(outputs) > 1 else outputs[0]

    def stream(self, messages: Any, max_new_tokens: int = 64, **kwargs: Any) -> TextStream:
        """The answer to one chat, piece by piece as it is generated; arguments as for `generate`.

        The request is checked before this returns. Leaving the loop early stops the generation.
        """
        start = time.perf_counter()
        if is_batch(messages):
            raise InputError(f"stream() takes one chat, found a list of {len(messages)}: use generate() for a batch")
        media = {k: kwargs.pop(k) for k in MEDIA_OPTIONS if k in kwargs}
        inputs = self.prepare([messages], **media)
        return TextStream(
            self.processor.tokenizer,
            lambda **control: self.run(inputs, start, max_new_tokens=max_new_tokens, **control, **kwargs)[0],
        )

    def chat(self, **kwargs: Any) -> Chat:
        """A conversation whose turns share the compressed cache; arguments as for `generate`."""
        media = {k: kwargs.pop(k) for k in MEDIA_OPTIONS if k in kwargs}
        return Chat(self, media, **kwargs)

    def load_chat(self, path: str | Path, **kwargs: Any) -> Chat:
        """A chat that `chat.save(path)` wrote, ready for its next turn; arguments as for `chat`.

        Raises:
            InputError: there is no such file, it holds no chat, or another model or config made it.
        """
        return self.chat(**kwargs).restore(path)

    @property
    def fingerprint(self) -> str:
        """Tells models apart whose caches do not fit each other: geometry and dtype, not weights."""
        return f"{self.adapter.spec} {self.model.dtype}"

    def check(self, messages: Any, *, max_video_tokens: int | None = None, **media: Any) -> list[dict[str, Any]]:
        """One chat, checked, its media loaded; arguments as for `generate`."""
        checked = normalise_messages(messages, supports_video=self.supports_video, **media)
        if max_video_tokens is None:
            return checked
        if not self.supports_video:
            raise InputError("max_video_tokens: this model takes a video as single images; use num_frames")
        for message in checked:
            message["content"] = [
                cap_video(self.processor, part, max_video_tokens) if part["type"] == "video" else part
                for part in message["content"]
            ]
        return checked

    def prepare(self, chats: Sequence[Any], **media: Any) -> dict[str, Any]:
        """Checks chats and turns them into the model's inputs, left-padded to one batch."""
        checked = [self.check(chat, **media) for chat in chats]
        return dict(build_inputs(self.processor, checked, device=self.device, dtype=self.model.dtype))

    def read(self, inputs: dict[str, Any], cache: CompressedCache) -> None:
        """Takes prepared inputs into a cache, without generating; if anything raises, the cache is as it was."""
        inputs = {**inputs, "attention_mask": None}  # of one chat, which is not padded
        with self._lock, patched(self.model, self.config):
            self.model(**inputs, **{CACHE_NAME: cache}, logits_to_keep=1, use_cache=True)

    def run(self, inputs: dict[str, Any], start: float, **generation_kwargs: Any) -> list[GenerationOutput]:
        """Generates from prepared inputs.

        Args:
            inputs: what `prepare` made.
            start: `time.perf_counter()` when the request came in.
            generation_kwargs: the host's.
        """
        if "stop_strings" in generation_kwargs:
            generation_kwargs.setdefault("tokenizer", self.processor.tokenizer)
        generation_kwargs["return_dict_in_generate"] = True
        with self._lock, patched(self.model, self.config, self.compile) as handle:
            handle.room = min(max(ROOM, generation_kwargs.get("max_new_tokens") or 0), MOST_ROOM)
            handle.end_ids = set() if generation_kwargs.get("num_beams", 1) > 1 else self._end_ids(generation_kwargs)
            with record_backends() as backends, peak_memory(self.device) as peak:
                result = self.model.generate(**inputs, **generation_kwargs)
            end = time.perf_counter()
        new = result.sequences[:, inputs["input_ids"].shape[1] :]
        times = self._times(handle, start, end, new.shape[1], peak.bytes, backends)
        logits = None if result.get("logits") is None else torch.stack(result.logits, 1)
        return [self._output(handle, row, ids, times, logits, generation_kwargs) for row, ids in enumerate(new)]

    def _times(
        self,
        handle: PatchHandle,
        start: float,
        end: float,
        new: int,
        peak_bytes: int,
        backends: dict[str, str],
    ) -> CallTimes:
        first = handle.first_token_at
        tpot = (1e3 * (end - first) - handle.compile_ms) / (new - 1) if new > 1 else None
        return CallTimes(1e3 * (first - start), handle.prompt_ms[-1], tpot, handle.compile_ms, peak_bytes, backends)

    def _output(
        self,
        handle: PatchHandle,
        row: int,
        ids: Tensor,
        times: CallTimes,
        logits: Tensor | None,
        generation_kwargs: dict[str, Any],
    ) -> GenerationOutput:
        token_ids = _until_end(ids.tolist(), self._end_ids(generation_kwargs))
        element_size = self.model.dtype.itemsize
        stats = stats_of(self.adapter.spec, handle.records[-1], row, len(token_ids), element_size, times)
        text = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()
        return GenerationOutput(text, token_ids, stats, None if logits is None else logits[row, : len(token_ids)])

    def _end_ids(self, generation_kwargs: dict[str, Any]) -> set[int]:
        given = generation_kwargs.get("generation_config") or self.model.generation_config
        end = generation_kwargs.get("eos_token_id", given.eos_token_id)
        return set() if end is None else set(end) if isinstance(end, (list, tuple)) else {end}


def _device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        found = str(error).partition("\n")[0]
        raise InputError(f"device {device!r}: {found}; pass one that this machine has, such as 'cpu'") from error
    return device


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if named != "auto" and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise InputError(f"dtype {dtype!r}: wanted float32, bfloat16, float16 or auto")
    return named


def check_before_loading(model_config: Any, config: InferenceConfig | None) -> None:
    """Checks the settings against a model without weights: real ones may take minutes to load."""
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(model_config)
    (config or InferenceConfig()).check(adapter_for(skeleton).spec)


def _until_end(ids: list[int], end_ids: set[int]) -> list[int]:
    """The ids up to the first end of turn, which is kept; what follows in a batch is padding."""
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[: i + 1]
    return ids
