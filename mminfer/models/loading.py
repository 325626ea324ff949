"""Loading a model and its processor by the host library: whole, or not at all."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PretrainedConfig
from transformers.utils import logging as hf_logging

from mminfer.errors import InputError, MminferError, shown
from mminfer.models.checkpoint import check_config, check_weights
from mminfer.models.registry import check_family
from mminfer.models.wrappers import DTYPES, check_loaded, named_dtypes

# Arguments of the host's that say where a checkpoint is, or what of it may be run.
_OF_ALL = (
    *("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies"),
    "trust_remote_code",
)
# Arguments of the host's that are ours to give.
_OURS = {
    "torch_dtype": "pass dtype",
    "use_safetensors": "leave it out: weights are read from safetensors alone",
    "output_loading_info": "leave it out: what does not fit is an error",
    "ignore_mismatched_sizes": "leave it out: weights of other sizes would be random ones",
    "state_dict": "leave it out: pass a model to Engine(model, processor)",
}
# Those that say where weights go, and those by which they are read in other ways than by name and shape.
_OF_PLACES = {"device_map", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers"}
_READ_OTHERWISE = {"gguf_file", "quantization_config", "tp_plan", "tp_size", "distributed_config", "adapter_kwargs"}
_DEEPEST = 4096  # layers; more are a mistake in a config, and building them would take for ever


class Checkpoint:
    """A checkpoint of the host library's, by name. Nothing is loaded before it is asked for.

    Args:
        name: a folder, or a hub name.
        hf_kwargs: the host's, of its `from_pretrained`. Code that lies beside weights is run only if
            `trust_remote_code=True` is among them.

    Raises:
        InputError: an argument is not to be given.
    """

    def __init__(self, name: str, hf_kwargs: Mapping[str, Any] | None = None) -> None:
        given = dict(hf_kwargs or {})
        for argument in _OURS.keys() & given.keys():
            raise InputError(f"{argument}={shown(given[argument])}: {_OURS[argument]}")
        if not isinstance(given.setdefault("trust_remote_code", False), bool):
            raise InputError(f"trust_remote_code={shown(given['trust_remote_code'])}: wanted True or False")
        self._name, self._kwargs = name, given
        self._is_quantised = False
        self._shared = {argument: given[argument] for argument in _OF_ALL if argument in given}

    def config(self) -> Any:
        """The host's config of a model of a supported family.

        Raises:
            UnsupportedModelError: the family has no adapter.
            InputError: there is no such checkpoint, or something of it is missing or damaged.
        """
        folder = self._folder()
        if folder is not None:
            check_config(folder)
        with self._reading():
            data, _ = PretrainedConfig.get_config_dict(self._name, **self._shared)
            found = data.get("model_type")
            check_family(found if isinstance(found, str) else None)
            _check_depth(self._name, data)
            config = AutoConfig.from_pretrained(self._name, **self._shared)
        self._is_quantised = getattr(config, "quantization_config", None) is not None
        if folder is not None:
            check_weights(folder, self._kwargs.get("variant"), quantised=self._is_quantised)
        return config

    def _folder(self) -> str | None:
        """Where the checkpoint is on this machine; None: it is the hub's, or in a format of its own."""
        subfolder = self._kwargs.get("subfolder")
        folder = os.path.join(self._name, subfolder) if isinstance(subfolder, str) and subfolder else self._name
        if os.path.isdir(folder):
            return None if "gguf_file" in self._kwargs else folder
        if os.path.isdir(self._name) or self._name.startswith(("/", ".", "~", "\\")) or self._name.count("/") > 1:
            raise InputError(f"no model at {shown(folder)}: there is no such folder: wanted a checkpoint's")
        return None

    def processor(self, config: Any) -> Any:
        """The processor of a model.

        Args:
            config: the model's.

        Raises:
            InputError: there is none, or it is another model's.
        """
        with self._reading():
            processor = AutoProcessor.from_pretrained(self._name, **self._shared)
        _check_whole(self._name, processor)
        mark, placeholder = (getattr(owner, "image_token_id", None) for owner in (processor, config))
        if mark is not None and placeholder is not None and mark != placeholder:
            raise InputError(
                f"the processor at {shown(self._name)} is another model's: it marks images by the token {mark}, this "
                f"model by {placeholder}: pass a folder whose files belong together"
            )
        return processor

    def model(self, dtype: torch.dtype | str, device: torch.device) -> Any:
        """The model with all its weights, on the device, unless `device_map` says where its parts go.

        Raises:
            InputError: weights are missing, damaged or of other sizes, or the host takes an argument not.
        """
        with self._reading(), _without_report():
            self._check_fit(dtype)
            model, report = self._load(self._kwargs, dtype)
            _check_report(self._name, report)
            if "device_map" not in self._kwargs:
                model = model.to(device=device)
        check_loaded(model)
        if unexpected := sorted(report.get("unexpected_keys") or ()):
            found = f"{len(unexpected)} weights that the model does not take, such as {unexpected[0]}"
            warnings.warn(f"{self._name:.200}: {found}", stacklevel=3)
        return model

    def _check_fit(self, dtype: torch.dtype | str) -> None:
        """Goes through all of the loading without reading or holding a number: what does not fit costs no memory."""
        kwargs = {name: value for name, value in self._kwargs.items() if name not in _OF_PLACES}
        if _READ_OTHERWISE & kwargs.keys() or self._is_quantised:
            return
        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            _, report = self._load({**kwargs, "device_map": {"": "meta"}}, dtype)
        finally:
            if bars:
                hf_logging.enable_progress_bar()
        _check_report(self._name, report)

    def _load(self, kwargs: Mapping[str, Any], dtype: torch.dtype | str) -> tuple[Any, dict[str, Any]]:
        """The model and the host's report of what did not fit."""
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            self._name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name, from the report
            **kwargs,
        )
        model, report = loaded
        return model, report

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tells what the host says of a checkpoint as an error of ours."""
        try:
            yield
        except (MminferError, MemoryError):
            raise
        except Exception as error:  # the host raises anything
            found = repr(error) if isinstance(error, KeyError) else " ".join(str(error).split()) or repr(error)
            raise InputError(
                f"no model, or no whole one, at {shown(self._name)}: {found:.300}: wanted a folder that "
                "save_pretrained() wrote, or a hub name"
            ) from error


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None: the GPU if there is one, else the CPU.

    Raises:
        InputError: this machine has none such, or it holds no numbers.
    """
    way_out = "pass one that this machine has, such as 'cpu'"
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        torch.empty(0, device=found)
    except Exception as error:  # backends that are not there raise anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {shown(device)}: {reason:.200}; {way_out}") from error
    if found.type == "meta":
        raise InputError(f"device {shown(device)}: it holds no numbers; {way_out}")
    return found


def chosen_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    """The dtype asked for; None: float32 on the CPU, else "auto", which is the checkpoint's own.

    Raises:
        InputError: there is none such, or no pass can be made in it.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if isinstance(named, torch.dtype) and named in DTYPES:
        return named
    if isinstance(named, str) and named == "auto":
        return named
    raise InputError(f"dtype {shown(dtype)}: wanted {named_dtypes()} or auto")


def _check_depth(name: str, config: Mapping[str, Any]) -> None:
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for field in ("num_hidden_layers", "depth"):
            layers = part.get(field) if isinstance(part, dict) else None
            if layers is not None and not (isinstance(layers, int) and 0 < layers <= _DEEPEST):
                raise InputError(f"{shown(name)}: {field} {shown(layers)} in its config.json: wanted 1 to {_DEEPEST}")


def _check_whole(name: str, processor: Any) -> None:
    """Raises `InputError` unless a processor takes texts and images of chats."""
    tokenizer = getattr(processor, "tokenizer", None)
    for part, there in (("tokenizer", tokenizer), ("image processor", getattr(processor, "image_processor", None))):
        if there is None:
            raise InputError(
                f"no whole processor at {shown(name)}: {type(processor).__name__} has no {part}: wanted the files "
                "of processor and tokenizer beside the weights"
            )
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        raise InputError(
            f"no chat template at {shown(name)}: put chat_template.jinja beside the weights, or load model and "
            "processor by the host library, set processor.chat_template, and pass both to Engine(model, processor)"
        )


def _check_report(name: str, report: Mapping[str, Any]) -> None:
    """Raises `InputError` where the host would go on with random weights."""
    found = []
    if report.get("mismatched_keys"):
        of_other_sizes = sorted(report["mismatched_keys"])
        key, theirs, wanted = of_other_sizes[0]
        found.append(f"{len(of_other_sizes)} of other sizes, such as {key}, {list(theirs)} for {list(wanted)}")
    if report.get("missing_keys"):
        missing = sorted(report["missing_keys"])
        found.append(f"{len(missing)} missing, such as {missing[0]}")
    if report.get("error_msgs"):
        found.append(f"{report['error_msgs'][0]!s:.200}")
    if found:
        raise InputError(
            f"no whole model at {shown(name)}: its weights do not fit its config.json: {'; '.join(found)}: pass a "
            "folder whose files belong together"
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """The host's table of what did not fit is left out: it is told as an error or a warning."""
    logger = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
