"""The engine: a model, its processor and a config; messages in, answers and figures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mminfer import nano
from mminfer.chat import Chat
from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError, InputError, UnsupportedModelError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.inputs.messages import (
    MediaOptions,
    as_text_part,
    count_parts,
    is_batch,
    last_content,
    load_parts,
    normalise_messages,
)
from mminfer.inputs.pieces import Reading, bare
from mminfer.inputs.request import build_inputs, cap_video, check_placeholders
from mminfer.models.registry import adapter_for, check_family
from mminfer.output import GenerationOutput
from mminfer.running import Runner, RunOptions
from mminfer.streaming import TextStream
from mminfer.technique import is_whole

MEDIA_OPTIONS = ("allow_remote", "num_frames", "fps", "max_video_tokens")


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
        self.runner = Runner(self.model, processor, self.adapter, self.config, compile)

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
        prefill_chunk_size: int | None = None,
        progress: bool = False,
        **generation_kwargs: Any,
    ) -> GenerationOutput | list[GenerationOutput]:
        """Answers one chat, or a list of chats in one batch.

        Args:
            messages: a chat (a list of messages with text, image and video parts, or just a string) or a list of chats.
                The parts of a message may come from any iterable.
            max_new_tokens: tokens to generate at most.
            allow_remote: whether image URLs may be fetched.
            num_frames: frames taken of each video file, evenly spread.
            fps: take so many frames a second instead.
            max_video_tokens: visual tokens of one video at most; frames are left out, evenly, until they fit.
            prefill_chunk_size: tokens of a chat that go through the model at a time, images never split. The parts of
                the last message are then loaded, encoded and compressed piece by piece, so memory follows from chunk
                and cache budget, not from the prompt. None: the prompt at once.
            progress: show a bar of the tokens read, where the prompt is read in chunks.
            generation_kwargs: the host's: `do_sample`, `temperature`, `stop_strings`, `num_beams`, `streamer`, ...

        Returns:
            One output, or a list for a list (with `num_return_sequences=n`, n outputs for each chat in turn).

        Raises:
            InputError: the request is wrong. The engine goes on with the next one.
        """
        prepare_kernels(self.device)
        start = time.perf_counter()
        chats = messages if is_batch(messages) else [messages]
        options = RunOptions(prefill_chunk_size, progress)
        media: dict[str, Any] = {
            "allow_remote": allow_remote,
            "num_frames": num_frames,
            "fps": fps,
            "max_video_tokens": max_video_tokens,
        }
        outputs = self._answering(chats, media, options, start)(max_new_tokens=max_new_tokens, **generation_kwargs)
        return outputs if is_batch(messages) or len(outputs) > 1 else outputs[0]

    def stream(self, messages: Any, max_new_tokens: int = 64, **kwargs: Any) -> TextStream:
        """The answer to one chat, piece by piece as it is generated; arguments as for `generate`.

        The request is checked before this returns. Leaving the loop early stops the generation.
        """
        prepare_kernels(self.device)
        start = time.perf_counter()
        if is_batch(messages):
            raise InputError(f"stream() takes one chat, found a list of {len(messages)}: use generate() for a batch")
        media, options = _split(kwargs)
        answer = self._answering([messages], media, options, start)
        return TextStream(
            self.processor.tokenizer,
            lambda **control: answer(max_new_tokens=max_new_tokens, **control, **kwargs)[0],
        )

    def chat(self, **kwargs: Any) -> Chat:
        """A conversation whose turns share the compressed cache; arguments as for `generate`."""
        media, options = _split(kwargs)
        self._check_options(options)
        return Chat(self, media, options, **kwargs)

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

    def check(self, messages: Any, *, lazy: bool = False, **media: Any) -> list[dict[str, Any]]:
        """One chat, checked, its media loaded; with `lazy` those of the last message later. See `generate`."""
        options = self._media_options(media)
        checked = normalise_messages(messages, options, lazy=lazy)
        for message in checked:
            capped = (self._capped(part, media) for part in message["content"])
            message["content"] = capped if lazy and message is checked[-1] else list(capped)
        return checked

    def load(self, content: Any, media: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts of a turn, each loaded when it is asked for; media: as for `generate`."""
        parts = load_parts(content, "message 0", self._media_options(media))
        return (self._capped(part, media) for part in parts)

    def _media_options(self, media: dict[str, Any]) -> MediaOptions:
        given = {name: value for name, value in media.items() if name != "max_video_tokens"}
        if media.get("max_video_tokens") is not None and not self.supports_video:
            raise InputError("max_video_tokens: this model takes a video as single images; use num_frames")
        return MediaOptions(**given, supports_video=self.supports_video, hidden_size=self.adapter.spec.hidden_size)

    def _capped(self, part: dict[str, Any], media: dict[str, Any]) -> dict[str, Any]:
        limit = media.get("max_video_tokens")
        return part if limit is None or part["type"] != "video" else cap_video(self.processor, part, limit)

    def prepare(self, chats: Sequence[Any], **media: Any) -> dict[str, Any]:
        """Checks chats and turns them into the model's inputs, left-padded to one batch."""
        checked = [self.check(chat, **media) for chat in chats]
        return dict(build_inputs(self.processor, checked, device=self.device, dtype=self.model.dtype))

    def _answering(
        self, chats: Sequence[Any], media: dict[str, Any], options: RunOptions, start: float
    ) -> Callable[..., list[GenerationOutput]]:
        """Checks a request; what comes back answers it, given the host's generation arguments."""
        if options.chunk_size is None:
            inputs = self.prepare(chats, **media)
            return lambda **kwargs: self.runner.run(inputs, start, **kwargs)
        self._check_options(options)
        readings = [self._whole_reading(chat, media, options) for chat in chats]
        caches = [CompressedCache() for _ in chats]
        return lambda **kwargs: self.runner.answer(readings, caches, start, options, **kwargs)

    def _whole_reading(self, chat: Any, media: dict[str, Any], options: RunOptions) -> Reading:
        """A chat that nothing was read of."""
        messages, content = self.check(chat, lazy=True, **media), last_content(chat)
        known = [part for m in messages[:-1] for part in m["content"]]
        known += [as_text_part(x) for x in (content if isinstance(content, (list, tuple)) else [content])]
        check_placeholders(self.processor, known)
        earlier = [{**m, "content": [bare(part, self.processor) for part in m["content"]]} for m in messages[:-1]]
        return Reading(
            self.runner.host,
            [*earlier, {**messages[-1], "content": []}],
            messages[-1]["content"],
            media=[part for m in messages[:-1] for part in m["content"] if part["type"] != "text"],
            piece_size=options.chunk_size,
            parts_expected=count_parts(content),
        )

    def _check_options(self, options: RunOptions) -> None:
        if options.chunk_size is None:
            return
        if not is_whole(options.chunk_size, least=1):
            raise ConfigError(
                f"prefill_chunk_size={options.chunk_size!r}, wanted 1 or more tokens, or None for the prompt at once"
            )
        for technique in self.config.techniques:
            if technique.needs_whole_prompt:
                raise ConfigError(
                    f"the prompt comes in piece by piece, but the whole is needed by {technique.needs_whole_prompt}"
                )


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], RunOptions]:
    """Takes the engine's own arguments out of a call's: how media are taken, and how the prompt goes in."""
    media = {k: kwargs.pop(k) for k in MEDIA_OPTIONS if k in kwargs}
    return media, RunOptions(kwargs.pop("prefill_chunk_size", None), kwargs.pop("progress", False))


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
