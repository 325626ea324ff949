"""A checkpoint's folder, looked at before anything of it is loaded."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from safetensors import SafetensorError, safe_open

from mminfer.errors import InputError, shown

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = ".safetensors"
_DTYPES = ("F32", "BF16", "F16", "F64")


def checked_name(given: Any) -> str:
    """The folder or hub name of a checkpoint as a string.

    Raises:
        InputError: it is neither.
    """
    wanted = "wanted a checkpoint's folder or hub name, or 'nano' for the bundled model"
    if not isinstance(given, (str, os.PathLike)):
        raise InputError(f"model {shown(given)}, of type {type(given).__name__}: {wanted}")
    name = os.fspath(given)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InputError(f"model {shown(name)}: {wanted}")
    if os.path.isfile(name):
        raise InputError(f"model {shown(name)}: that is a file: wanted the checkpoint's folder")
    return name


def check_config(folder: str) -> None:
    """Whether a folder of this machine holds a checkpoint's config.

    Raises:
        InputError: it is not there, or damaged.
    """
    at = _at(folder)
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise InputError(f"{at}: it holds no config.json: wanted a folder that save_pretrained() wrote")
    for name in sorted(os.listdir(folder)):
        if name.endswith((".json", _WEIGHTS, ".jinja")) and not _is_regular(os.path.join(folder, name)):
            raise InputError(f"{at}: {name} is no regular file: wanted a folder that save_pretrained() wrote")
    if not isinstance(_read_json(folder, "config.json", at), dict):
        raise InputError(f"{at}: its config.json holds no object: wanted one with a model_type")


def check_weights(folder: str, variant: str | None = None, *, quantised: bool = False) -> None:
    """Whether a folder of this machine holds the safetensors files of all weights of a checkpoint, each of them whole.

    Args:
        folder: with the checkpoint.
        variant: of the weights, as the host names them; None: the usual ones.
        quantised: whether the config says how weights are quantised; else they are floating-point numbers.

    Raises:
        InputError: a file is not there, damaged, or of other numbers.
    """
    at = _at(folder)
    for name in _weight_files(folder, "" if variant is None else f".{variant}", at):
        _check_header(folder, name, at, quantised)


def _at(folder: str) -> str:
    return f"no model, or no whole one, at {shown(folder)}"


def _weight_files(folder: str, variant: str, at: str) -> list[str]:
    """The files of the weights; variant: in their names."""
    single, index = f"model{variant}{_WEIGHTS}", f"model{_WEIGHTS}.index{variant}.json"
    if os.path.exists(os.path.join(folder, single)):
        return [single]
    if os.path.exists(os.path.join(folder, index)):
        return _shards(folder, index, at)
    pickled = [name for name in sorted(os.listdir(folder)) if name.endswith(_PICKLED)]
    if pickled:
        raise InputError(
            f"{at}: its weights are pickled ({pickled[0]:.100}), which may run code when read: where you trust "
            "it, load it with the host library and write it as safetensors by save_pretrained()"
        )
    raise InputError(f"{at}: it holds no weights: wanted {single}, or {index} with its shards")


def _shards(folder: str, index: str, at: str) -> list[str]:
    """The files that an index names."""
    data = _read_json(folder, index, at)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{at}: its {index} names no shards: wanted a weight_map of tensors and files")
    files = sorted(set(names.values()))
    for name in files:
        if os.path.basename(name) != name or not os.path.exists(os.path.join(folder, name)):
            raise InputError(f"{at}: the file {shown(name)} that its {index} names is not there: fetch it once more")
    return files


def _check_header(folder: str, name: str, at: str, quantised: bool) -> None:
    """Reads the header of a file alone, which tells how long the file has to be."""
    path = os.path.join(folder, name)
    try:
        with safe_open(path, "pt") as file:
            weights = [key for key in file.keys() if key.endswith((".weight", ".bias"))]  # noqa: SIM118
            other = {} if quantised else {key: file.get_slice(key).get_dtype() for key in weights}
    except (OSError, SafetensorError) as error:
        reason = "is a Git LFS pointer: run `git lfs pull`" if _is_pointer(path) else f"is damaged or cut ({error})"
        raise InputError(f"{at}: {name} {reason:.200}; wanted the whole file") from error
    for key, dtype in other.items():
        if dtype not in _DTYPES:
            raise InputError(
                f"{at}: {key:.100} in {name}: {dtype}, but config.json names no quantization_config: wanted one, "
                f"or weights of {', '.join(_DTYPES)}"
            )


def _is_pointer(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(32).startswith(b"version https://git-lfs")


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _read_json(folder: str, name: str, at: str) -> Any:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{at}: its {name} is no JSON ({error!s:.200}): fetch it once more") from error
