"""Folders that hold no whole checkpoint, another's files or other code: each is refused by a typed error."""

import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mminfer import Engine, InputError, UnsupportedModelError, nano

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(nano.checkpoint_path(), tmp_path / "model")


def edit(name="config.json", part=None, **fields):
    """Fields of a JSON file, or of an object in it; None takes one out."""

    def act(folder):
        data = json.loads((folder / name).read_text())
        own = data if part is None else data[part]
        own.update(fields)
        for field in [field for field, value in fields.items() if value is None]:
            del own[field]
        (folder / name).write_text(json.dumps(data))

    return act


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def weights(change):
    """Other weights; change: of names and tensors to those."""

    def act(folder):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return act


def sharded(lost):
    """Two files and their index, without one of these."""

    def act(folder):
        tensors = load_file(folder / WEIGHTS)
        files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(files.values()):
            save_file({n: x for n, x in tensors.items() if files[n] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": files}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        without(WEIGHTS, *lost)(folder)

    return act


def only_pickled(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pipe(name):
    def act(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return act


FAULTS = {
    "no config": (without("config.json"), "holds no config.json"),
    "an empty config": (write("config.json", b""), "config.json is no JSON"),
    "a list": (write("config.json", b"[]"), "holds no object"),
    "a deep config": (write("config.json", b"[" * 100_000), "config.json is no JSON"),
    "a default language model": (edit(text_config=None), "do not fit its config.json: .* of other sizes"),
    "a language model of another class": (edit(part="text_config", model_type="gpt2"), "no model can be made"),
    "sizes that are none": (edit(part="text_config", hidden_size=-1), "no model can be made|no whole one"),
    "a million layers": (edit(part="text_config", num_hidden_layers=10**6, layer_types=None), "wanted 1 to 4096"),
    "a layer more": (
        edit(part="text_config", num_hidden_layers=7, layer_types=None),
        r"12 missing, such as .*layers\.6",
    ),
    "weights of other sizes": (edit(part="text_config", hidden_size=96), r"of other sizes, such as .*\[\d+.*\] for \["),
    "no weights": (without(WEIGHTS), "holds no weights: wanted model.safetensors"),
    "weights cut": (lambda folder: os.truncate(folder / WEIGHTS, 3_000_000), "damaged or cut"),
    "a pointer": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "pickled weights": (only_pickled, "weights are pickled .*save_pretrained"),
    "one weight gone": (weights(lambda x: dict(sorted(x.items())[1:])), "2 missing, such as lm_head.weight"),
    "other names": (weights(lambda x: {f"x.{name}": tensor for name, tensor in x.items()}), "missing, such as"),
    "whole numbers": (weights(lambda x: {name: tensor.int() for name, tensor in x.items()}), "names no quantization"),
    "a shard gone": (sharded(["model-00002-of-00002.safetensors"]), "index.json names is not there"),
    "an index of nothing": (sharded([f"{WEIGHTS}.index.json"]), "holds no weights"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no model, or no whole one"),
    "no processor": (without("processor_config.json"), "no model, or no whole one"),
    "another processor": (edit(image_token_id=5), "marks images by the token 7, this model by 5"),
    "no chat template": (without("chat_template.jinja"), "no chat template at"),
    "generation settings that are none": (write("generation_config.json", b"[]"), "no model, or no whole one"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_whole_is_refused(folder, name):
    act, says = FAULTS[name]
    act(folder)
    with pytest.raises(InputError, match=says):
        Engine.from_pretrained(folder)


@pytest.mark.parametrize("found", [None, 3, ["internvl"], "foo_vl"])
def test_unknown_types_are_refused_by_name(folder, found):
    (folder / "config.json").write_text(json.dumps({"model_type": found}))
    with pytest.raises(UnsupportedModelError, match=r"is not supported; supported families: .*internvl"):
        Engine.from_pretrained(str(folder))


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer_config.json"])
def test_pipes_are_not_waited_for(folder, name):
    pipe(name)(folder)
    with pytest.raises(InputError, match=f"{name} is no regular file"):
        Engine.from_pretrained(folder)


def test_misfits_cost_no_memory(folder, monkeypatch):
    """They are found on a model without numbers, and told without the host's table."""
    from transformers import AutoModelForImageTextToText as Host

    load, maps, told = Host.from_pretrained, [], []

    def watched(*args, **kwargs):
        maps.append(kwargs.get("device_map"))
        return load(*args, **kwargs)

    monkeypatch.setattr(Host, "from_pretrained", watched)
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    try:
        edit(part="text_config", hidden_size=96)(folder)
        with pytest.raises(InputError):
            Engine.from_pretrained(folder)
    finally:
        logger.removeHandler(handler)
    assert maps == [{"": "meta"}] and not [line for line in told if "REPORT" in line]


def test_whole_checkpoints_load(folder):
    """In shards too, by a path, and with a word on what nobody takes."""
    sharded([])(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Engine.from_pretrained(Path(folder)).generate("Which code?", 2).token_ids
    assert found == Engine.from_pretrained("nano").generate("Which code?", 2).token_ids
    save_file({"spare": torch.zeros(1)}, folder / "model-00003.safetensors", {"format": "pt"})
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    index["weight_map"]["spare"] = "model-00003.safetensors"
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="1 weights that the model does not take, such as spare"):
        Engine.from_pretrained(folder)


@pytest.mark.parametrize("wanted", ["P", "InternVLProcessor"])
def test_code_beside_weights_is_not_run(folder, tmp_path, wanted):
    """Neither modules that configs name, nor a `generate` of the folder's own."""
    code = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import InternVLProcessor as P, InternVLConfig as C\n"
    )
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, **kwargs): pass\n")
    edit(auto_map={"AutoConfig": "own.C", "AutoModelForImageTextToText": "own.M"})(folder)
    edit("processor_config.json", auto_map={"AutoProcessor": "own.P"}, processor_class=wanted)(folder)
    edit("tokenizer_config.json", processor_class=wanted)(folder)
    try:
        Engine.from_pretrained(folder).generate("Which code?", 1)
    except InputError as error:
        assert "custom code" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", [None, 3, b"nano", "", " ", "a\0b", ["nano"], "/nowhere", "./nowhere", "a/b/c", "no/such", __file__]
)
def test_what_is_no_checkpoint_is_refused_by_name(name):
    with pytest.raises(InputError, match="model"):
        Engine.from_pretrained(name)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"device": "meta"}, "'meta': it holds no numbers"),
        ({"device": []}, "device"),
        ({"device": "hpu"}, "device 'hpu'"),
        ({"device": ""}, "device ''"),
        ({"device": "cpu", "device_map": "cpu"}, "device_map: pass one of them"),
        ({"device_map": "meta"}, "meta"),
        ({"device_map": "banana"}, "banana"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn': wanted float32"),
        ({"dtype": torch.int8}, "dtype torch.int8: wanted float32"),
        ({"dtype": "load"}, "dtype 'load': wanted"),
        ({"dtype": 3}, "dtype 3: wanted"),
        ({"torch_dtype": "float16"}, "pass dtype"),
        ({"ignore_mismatched_sizes": True}, "leave it out"),
        ({"use_safetensors": False}, "leave it out"),
        ({"trust_remote_code": "yes"}, "wanted True or False"),
        ({"foo": 1}, "unexpected keyword argument 'foo'"),
        ({"subfolder": "nowhere"}, "no such folder"),
        ({"attn_implementation": "foo"}, "foo"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, says):
    with pytest.raises((InputError, UnsupportedModelError), match=says):
        Engine.from_pretrained("nano", **kwargs)


def test_an_engine_wants_numbers_and_its_requests_a_processor():
    engine = Engine.from_pretrained("nano")
    for processor in (None, engine.processor.image_processor, "nano"):
        with pytest.raises(InputError, match="with a tokenizer"):
            Engine(engine.model, processor).generate("hi", 1)
    with pytest.raises(UnsupportedModelError, match="meta"):
        Engine(engine.model.to("meta"), engine.processor)
