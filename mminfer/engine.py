"""The engine: a model, its processor and a config; messages in, answers and figures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mminfer import nano
from mminfer.chat import OF_ALL_TURNS, ONE_ANSWER, CallOptions, Chat, ChatIdentity
from mminfer.config import InferenceConfig, checked_config
from mminfer.errors import ConfigError, InputError, UnsupportedModelError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import check_native_isa, prepare_kernels
from mminfer.inputs.content import MEDIA_OPTIONS, MediaOptions
from mminfer.inputs.messages import is_batch
from mminfer.inputs.parts import Message, Part
from mminfer.inputs.reader import RequestReader
from mminfer.inputs.request import Request
from mminfer.models.loading import chosen_device, chosen_dtype
from mminfer.models.registry import adapter_for, check_family
from mminfer.output import GenerationOutput
from mminfer.running import GenerationSettings, Runner, RunOptions
from mminfer.streaming import TextStream
from mminfer.technique import is_whole

OneChat = str | Part | Message | Iterable[str | Mapping[str, Any] | Part | Message]
Chats = Sequence[list[Any] | tuple[Any, ...] | str]

_NOT_GIVEN: Any = object()


class Engine:
    """Runs a Hugging Face vision-language model with the techniques of a config. The model stays as it is.

    Args:
        model: a `...ForConditionalGeneration` of a supported family.
        processor: its processor.
        config: the techniques; None: all off.
        compile: decode by the host's modules under torch.compile; see `mminfer.patch`.

    Raises:
        UnsupportedModelError: the family has no adapter.
        ConfigError: a setting does not fit the model, or the config is none.
    """

    def __init__(
        self, model: nn.Module, processor: Any, config: InferenceConfig | None = None, compile: bool = False
    ) -> None:
        self.config = InferenceConfig() if config is None else checked_config(config)
        self.model: Any = model.eval()
        self.processor = processor
        self.adapter = adapter_for(model)
        self.config.check(self.adapter.spec)
        self.runner = Runner(self.model, processor, self.adapter, self.config, compile)
        self.reader = RequestReader(self.model, processor, self.adapter)

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
            ConfigError: a setting does not fit the model, or the config is none.
        """
        config = InferenceConfig() if config is None else checked_config(config)
        path = str(nano.checkpoint_path()) if name_or_path == nano.NANO else name_or_path
        shared = {k: hf_kwargs[k] for k in ("revision", "token", "cache_dir", "trust_remote_code") if k in hf_kwargs}
        device = chosen_device(device)
        dtype = chosen_dtype(dtype, device)
        check_native_isa()
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
        return self.reader.device

    @property
    def supports_video(self) -> bool:
        """Whether the host's processor takes videos; else their frames go in as images."""
        return self.reader.supports_video

    @property
    def fingerprint(self) -> str:
        """Tells models apart whose caches do not fit each other: geometry and dtype, not weights."""
        return f"{self.adapter.spec} {self.model.dtype}"

    @overload
    def generate(
        self, messages: OneChat, max_new_tokens: int = ..., *, num_return_sequences: int, **kwargs: Any
    ) -> GenerationOutput | list[GenerationOutput]: ...

    @overload
    def generate(self, messages: str, max_new_tokens: int = ..., **kwargs: Any) -> GenerationOutput: ...

    @overload
    def generate(self, messages: Chats, max_new_tokens: int = ..., **kwargs: Any) -> list[GenerationOutput]: ...

    @overload
    def generate(self, messages: OneChat, max_new_tokens: int = ..., **kwargs: Any) -> GenerationOutput: ...

    def generate(
        self,
        messages: Any,
        max_new_tokens: int = _NOT_GIVEN,
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
                A list of strings alone is one of chats; among other parts they are the parts of one message. The parts
                of a message may come from any iterable. Chats that are typed already (`engine.check`) are
                not checked or opened again.
            max_new_tokens: tokens to generate at most. Where it is not given, the host's `generate` decides:
                by `max_length`, else by `generation_config`, else by the model's; 64 where none says anything.
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
        settings = self.runner.settings(_with_length(generation_kwargs, max_new_tokens))
        media = MediaOptions(allow_remote, num_frames, fps, max_video_tokens)
        request = self.prepare_request(messages, media, prefill_chunk_size)
        outputs = self._answer(request, settings, progress)
        return outputs if request.is_batch or len(outputs) > 1 else outputs[0]

    def stream(self, messages: OneChat, max_new_tokens: int = _NOT_GIVEN, **kwargs: Any) -> TextStream:
        """The answer to one chat, piece by piece as it is generated; arguments as for `generate`.

        The request is checked before this returns. Leaving the loop early stops the generation.
        """
        if is_batch(messages):
            raise InputError(f"stream() takes one chat, found a list of {len(messages)}: use generate() for a batch")
        given = _with_length(kwargs, max_new_tokens)
        if given.pop("streamer", None) is not None:
            raise InputError("streamer: stream() has one of its own; use generate() with yours")
        options = self._call_options(given)
        settings = self.runner.settings(options.generation, one_answer_for="a stream is of one answer; use generate()")
        request = self.prepare_request(messages, options.media, options.run.chunk_size)

        def run(streamer: Any, stopping_criteria: Any, stopped: Callable[[], bool]) -> GenerationOutput:
            controlled = settings.controlled(streamer, stopping_criteria)
            return self._answer(request, controlled, options.run.progress, stopped)[0]

        return TextStream(self.processor.tokenizer, run, settings.stopping_criteria)

    def chat(self, *, system: str | None = None, **kwargs: Any) -> Chat:
        """A conversation whose turns share the compressed cache.

        Args:
            system: what the system says before the first turn.
            kwargs: as for `generate`, for every turn; `chat.send` may override those of the host's.

        Raises:
            InputError: an argument is unknown, or does not go with a chat.
            ConfigError: the settings do not go with `prefill_chunk_size`.
        """
        options = self._call_options(kwargs)
        self.runner.settings(options.generation, one_answer_for=ONE_ANSWER)
        identity = ChatIdentity(self.fingerprint, self.config.to_dict())
        return Chat(self.reader, self.runner, identity, options, system)

    def load_chat(self, path: str | Path, **kwargs: Any) -> Chat:
        """A chat that `chat.save(path)` wrote, ready for its next turn; arguments as for `chat`.

        Raises:
            InputError: there is no such file, it holds no chat, another model or config made it, or an argument is
                wrong.
        """
        if kwargs.get("system") is not None:
            raise InputError("system: a saved chat has kept its own system prompt: leave it out")
        return self.chat(**kwargs).restore(path)

    def check(self, messages: Any, **media: Any) -> list[Message]:
        """One chat, checked, its media loaded: typed messages, which can be asked about any number of times.

        Args:
            messages: as for `generate`.
            media: `allow_remote`, `num_frames`, `fps` and `max_video_tokens` of `generate`.
        """
        if is_batch(messages):
            raise InputError(
                f"check() takes one chat, found a list of {len(messages)}: check them one by one. Texts that belong to "
                'one message go into {"role": "user", "content": [...]}'
            )
        return self.reader.check(messages, MediaOptions.of(media))

    def prepare(self, chats: Sequence[Any], **media: Any) -> dict[str, Any]:
        """Checks chats and turns them into the model's inputs, left-padded to one batch; arguments as for `check`."""
        if not is_batch(chats):
            raise InputError(f"prepare() takes a list of chats, found {type(chats).__name__}: put one chat into a list")
        return self.reader.inputs(chats, MediaOptions.of(media))

    def prepare_request(
        self, messages: Any, media: MediaOptions | None = None, prefill_chunk_size: int | None = None
    ) -> Request:
        """One chat or a list of chats, checked and prepared to be answered; see `generate`.

        `answer` takes it any number of times, also that of another engine of the same model, with other settings.
        """
        start = time.perf_counter()
        media = media or MediaOptions()
        batch = is_batch(messages)
        chats = messages if batch else [messages]
        if prefill_chunk_size is None:
            inputs = self.reader.inputs(chats, media)
            return Request(batch, inputs, preparation_s=time.perf_counter() - start)
        self._check_chunks(prefill_chunk_size)
        readings = tuple(self.reader.readings(chat, media, prefill_chunk_size) for chat in chats)
        return Request(batch, None, readings, prefill_chunk_size, time.perf_counter() - start)

    def answer(
        self,
        request: Request,
        max_new_tokens: int = _NOT_GIVEN,
        *,
        progress: bool = False,
        **generation_kwargs: Any,
    ) -> list[GenerationOutput]:
        """Answers a prepared request: the outputs of each of its chats in turn. Arguments as for `generate`."""
        settings = self.runner.settings(_with_length(generation_kwargs, max_new_tokens))
        return self._answer(request, settings, progress)

    def _answer(
        self,
        request: Request,
        settings: GenerationSettings,
        progress: bool,
        stopped: Callable[[], bool] | None = None,
    ) -> list[GenerationOutput]:
        prepare_kernels(self.device)
        start = time.perf_counter() - request.preparation_s
        if request.inputs is not None:
            return self.runner.run(request.inputs, start, settings)
        self._check_chunks(request.chunk_size)
        options = RunOptions(request.chunk_size, progress)
        readings = [begin() for begin in request.readings]
        caches = [CompressedCache() for _ in readings]
        return self.runner.answer(readings, caches, start, options, settings, stopped)

    def _call_options(self, kwargs: dict[str, Any]) -> CallOptions:
        """A call's arguments, sorted by who takes them; those of generation are not checked yet."""
        media = MediaOptions(**{name: kwargs[name] for name in MEDIA_OPTIONS if name in kwargs})
        run = RunOptions(kwargs.get("prefill_chunk_size"), kwargs.get("progress", False))
        generation = {name: value for name, value in kwargs.items() if name not in OF_ALL_TURNS}
        self.reader.check_options(media)
        self._check_chunks(run.chunk_size)
        return CallOptions(media, run, generation)

    def _check_chunks(self, size: int | None) -> None:
        """Raises `ConfigError` where prompts cannot go in by chunks of this size; None: they need not."""
        if size is None:
            return
        if not is_whole(size, least=1):
            raise ConfigError(f"prefill_chunk_size={size!r}, wanted 1 or more tokens, or None for the prompt at once")
        for technique in self.config.techniques:
            if technique.needs_whole_prompt:
                raise ConfigError(
                    f"the prompt comes in piece by piece, but the whole is needed by {technique.needs_whole_prompt}"
                )


def _with_length(kwargs: dict[str, Any], max_new_tokens: Any) -> dict[str, Any]:
    """Arguments of generation, the length among them if it was given."""
    return dict(kwargs) if max_new_tokens is _NOT_GIVEN else {**kwargs, "max_new_tokens": max_new_tokens}


def check_before_loading(model_config: Any, config: InferenceConfig) -> None:
    """Checks the settings against a model without weights: real ones may take minutes to load."""
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(model_config)
    config.check(adapter_for(skeleton).spec)
