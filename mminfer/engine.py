"""The engine: a model, its processor and a config; messages in, answers and figures out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, overload

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from mminfer import nano
from mminfer.chat import OF_ALL_TURNS, ONE_ANSWER, CallOptions, Chat
from mminfer.chat_files import ChatIdentity
from mminfer.config import InferenceConfig, check_flag, checked_config
from mminfer.errors import ConfigError, InputError, shown
from mminfer.forward.host_check import check_host
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import check_native_isa, prepare_kernels
from mminfer.inputs.content import MEDIA_OPTIONS, MediaOptions
from mminfer.inputs.messages import is_batch
from mminfer.inputs.parts import Message, Part
from mminfer.inputs.reader import RequestReader
from mminfer.inputs.request import Request
from mminfer.models.checkpoint import checked_name
from mminfer.models.encoder_cache import encoder_cache_of
from mminfer.models.loading import Checkpoint, chosen_device, chosen_dtype
from mminfer.models.registry import adapter_for
from mminfer.models.wrappers import check_loaded, unwrapped
from mminfer.output import GenerationOutput
from mminfer.patching import is_patched
from mminfer.running import GenerationSettings, Runner, RunOptions
from mminfer.streaming import TextStream
from mminfer.technique import is_whole

OneChat = str | Part | Message | Iterable[str | Mapping[str, Any] | Part | Message]
Chats = Sequence[list[Any] | tuple[Any, ...] | str]

_NOT_GIVEN: Any = object()


class Engine:
    """Runs a Hugging Face vision-language model with the techniques of a config. The model stays as it is.

    Calls of one model take turns, whichever engines and threads they come from. They run in eval mode, whatever mode
    the model is in, and whoever calls the model itself meanwhile gets the host's own answer.

    Args:
        model: a `...ForConditionalGeneration` of a supported family; also within `torch.compile(model)`, which then has
            no effect, or with adapters of peft that change its layers.
        processor: its processor; without one of a vision-language model, calls that read messages are refused.
        config: the techniques; None: all off.
        compile: decode by the host's modules under torch.compile; see `mminfer.patch`.
        verify: whether to compare our pass with the host's own first; see `mminfer.patch`.
        encoder_cache_bytes: memory for encoded pictures: one that comes again, in a batch, a chat or another request,
            costs no pass of the vision tower. 0: none are kept.

    Attributes:
        encoder_cache: what is kept of encoded pictures; None: nothing.

    Raises:
        UnsupportedModelError: the family has no adapter, weights are missing, the model stands in another wrapper, or
            our pass is not the host's own for this language model.
        ConfigError: a setting does not fit the model, the config is none, `compile` or `verify` no bool, or
            `encoder_cache_bytes` no number of bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        config: InferenceConfig | None = None,
        compile: bool = False,
        verify: bool = True,
        encoder_cache_bytes: int = 0,
    ) -> None:
        self.config = InferenceConfig() if config is None else checked_config(config)
        check_flag("compile", compile)
        check_flag("verify", verify)
        self.encoder_cache = encoder_cache_of(encoder_cache_bytes)
        self.model: Any = unwrapped(model)
        self.processor = processor
        self.adapter = adapter_for(self.model)
        self.adapter.encoder_cache = self.encoder_cache
        check_loaded(self.model)
        self.config.check(self.adapter.spec)
        self.config.check_calibration(self.adapter)
        check_host(self.adapter, self.config, verify and not is_patched(self.model))  # else before the first call
        self.config.warn_of_doubts(self.adapter.spec)
        self.runner = Runner(self.model, processor, self.adapter, self.config, compile, verify)
        self.reader = RequestReader(self.model, processor, self.adapter)
        self._made_with = compile, verify, encoder_cache_bytes
        self._identity = ChatIdentity(self.adapter, processor, self.config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str] = nano.NANO,
        config: InferenceConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        verify: bool = True,
        encoder_cache_bytes: int = 0,
        **hf_kwargs: Any,
    ) -> Engine:
        """Loads a model and its processor by the host library; safetensors only.

        Weights that are missing or of other sizes than the config says are an error, and nothing is loaded before
        config, settings and processor are known to fit. Code that lies beside the weights is run only with
        `trust_remote_code=True`.

        Args:
            name_or_path: a checkpoint's folder or hub name, or "nano" for the bundled model.
            config: the techniques; None: all off.
            device: default the GPU if there is one, else the CPU.
            dtype: default float32 on the CPU, the checkpoint's own on a GPU.
            compile: decode by the host's modules under torch.compile; see `mminfer.patch`.
            verify: whether to compare our pass with the host's own first; see `mminfer.patch`.
            encoder_cache_bytes: as of the class.
            hf_kwargs: passed on to the host's `from_pretrained` (`device_map`, `revision`, `trust_remote_code`, ...).

        Raises:
            UnsupportedModelError: the family has no adapter; nothing was loaded.
            InputError: there is no such checkpoint, something of it is missing or damaged, or an argument is wrong.
            ConfigError: a setting does not fit the model, or the config is none.
        """
        config = InferenceConfig() if config is None else checked_config(config)
        encoder_cache_of(encoder_cache_bytes)
        name = checked_name(name_or_path)
        if device is not None and "device_map" in hf_kwargs:
            raise InputError(f"device={shown(device)} and device_map: pass one of them")
        device = chosen_device(device)
        dtype = chosen_dtype(dtype, device)
        check_native_isa()
        checkpoint = Checkpoint(str(nano.checkpoint_path()) if name == nano.NANO else name, hf_kwargs)
        model_config = checkpoint.config()
        check_before_loading(model_config, config)
        processor = checkpoint.processor(model_config)
        return cls(checkpoint.model(dtype, device), processor, config, compile, verify, encoder_cache_bytes)

    def __copy__(self) -> Engine:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """An engine of a copy of the model; only the locks of the first stay its own."""
        model, processor = copy.deepcopy(self.model, memo), copy.deepcopy(self.processor, memo)
        other = copy.copy(self)
        Engine.__init__(other, model, processor, self.config, *self._made_with)
        return other

    def __reduce__(self) -> NoReturn:
        raise InputError("an engine cannot be pickled: make one in each process, by Engine.from_pretrained(...)")

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
        return self._identity.geometry

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
        allow_private_hosts: bool = False,
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
            allow_private_hosts: whether URLs may lead to this machine or its network.
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
        media = MediaOptions(allow_remote, num_frames, fps, max_video_tokens, allow_private_hosts)
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
        self.runner.check_free()
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
        return Chat(self.reader, self.runner, self._identity, options, system)

    def load_chat(self, path: str | Path, **kwargs: Any) -> Chat:
        """A chat that `chat.save(path)` wrote, ready for its next turn; arguments as for `chat`.

        Raises:
            InputError: there is no such file, it holds no chat, it was damaged or changed, another model or config made
                it, or an argument is wrong.
        """
        if kwargs.get("system") is not None:
            raise InputError("system: a saved chat has kept its own system prompt: leave it out")
        return self.chat(**kwargs).restore(path)

    def check(self, messages: Any, **media: Any) -> list[Message]:
        """One chat, checked, its media loaded: typed messages, which can be asked about any number of times.

        Args:
            messages: as for `generate`.
            media: `allow_remote`, `num_frames`, `fps`, `max_video_tokens` and `allow_private_hosts` of `generate`.
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
            return self.runner.run(request.inputs, start, settings, stopped)
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
    try:
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(model_config)
    except Exception as error:  # the host raises anything
        raise InputError(
            f"no model can be made by this config.json: {error!r:.400}: wanted the checkpoint's own"
        ) from error
    config.check(adapter_for(skeleton).spec)
