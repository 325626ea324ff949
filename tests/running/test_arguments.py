"""Every argument that the host's `generate` takes is honoured, harmless or refused by name, before any pass."""

import copy
import inspect

import pytest
import torch
from transformers import GenerationConfig, TextStreamer
from transformers.generation import GenerationMixin

from mminfer import InputError
from mminfer.running.arguments import HARMLESS, IDLE, NUMBERS, REASONS, SWITCHES, is_honoured
from tests.engines import tiny_engine

__all__ = ["tiny_engine"]

OF_CALL = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
OF_CONFIG = {name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version"}
OTHERS = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}  # which `generate` takes from its keyword arguments
OF_MODELS = {"input_ids", "attention_mask", "position_ids", "pixel_values", "inputs_embeds", "labels", "logits_to_keep"}
REFUSED = sorted(name for name in OF_CALL | OF_CONFIG | OTHERS | OF_MODELS if not is_honoured(name))

WRONG = [
    {"max_new_tokens": "5"},
    {"max_new_tokens": 2**70},
    {"max_new_tokens": None},
    {"max_length": 0},
    {"min_new_tokens": "1"},
    {"min_length": -1},
    {"do_sample": "yes"},
    {"do_sample": True, "temperature": -1.0},
    {"do_sample": True, "temperature": 0.0},
    {"do_sample": True, "temperature": 1e-42},
    {"temperature": "hot"},
    {"temperature": -1.0},
    {"top_k": -1},
    {"do_sample": True, "top_k": 1.5},
    {"top_p": 2.0},
    {"top_p": float("nan")},
    {"min_p": -0.1},
    {"typical_p": 0.0},
    {"eta_cutoff": 2.0},
    {"repetition_penalty": -1.0},
    {"repetition_penalty": "x"},
    {"no_repeat_ngram_size": 1.5},
    {"no_repeat_ngram_size": 10**9},
    {"encoder_no_repeat_ngram_size": 10**9},
    {"bad_words_ids": 5},
    {"bad_words_ids": [[10**9]]},
    {"sequence_bias": {(10**9,): 1.0}},
    {"suppress_tokens": 5},
    {"do_sample": True, "suppress_tokens": list(range(501))},
    {"exponential_decay_length_penalty": (1, "x")},
    {"watermarking_config": 5},
    {"guidance_scale": "x"},
    {"length_penalty": "x", "num_beams": 2},
    {"length_penalty": None, "num_beams": 2},
    {"length_penalty": 1e30, "num_beams": 2},
    {"guidance_scale": 2**70},
    {"early_stopping": [1], "num_beams": 2},
    {"num_beams": "2"},
    {"num_beams": 10**9},
    {"num_beams": 4096, "max_new_tokens": 2**30},
    {"num_return_sequences": 2},
    {"num_beams": 2, "num_return_sequences": 3},
    {"eos_token_id": "x"},
    {"eos_token_id": {"a": 1}},
    {"eos_token_id": 1.5},
    {"eos_token_id": []},
    {"eos_token_id": torch.empty(1, device="meta")},
    {"eos_token_id": list(range(501)), "num_beams": 2},
    {"pad_token_id": [1, 2]},
    {"pad_token_id": [1]},
    {"pad_token_id": 10**9},
    {"forced_eos_token_id": 10**9},
    {"max_time": "x"},
    {"stop_strings": 5},
    {"stopping_criteria": 5},
    {"stopping_criteria": [5]},
    {"stopping_criteria": [lambda ids: True]},
    {"logits_processor": 5},
    {"logits_processor": ["abc"]},
    {"prefix_allowed_tokens_fn": 5},
    {"generation_config": 5},
    {"generation_config": {"max_new_tokens": 5}},
    {"generation_config": GenerationConfig(max_new_tokenz=5)},
    {"generation_config": GenerationConfig(penalty_alpha=0.6, top_k=4)},
    {"penalty_alpha": 0.6},
    {"prompt_lookup_num_tokens": 3},
    {"use_cache": False},
    {"cache_implementation": "dynamic"},
    {"return_dict_in_generate": False},
    {"output_scores": True},
    {"synced_gpus": True},
    {"stopped": 5},
    {"assistant_model": False},
    {"custom_generate": False},
    {"inputs_embeds": False},
]


@pytest.fixture
def no_pass(tiny_engine):
    """No layer may be called."""
    hook = tiny_engine.adapter.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a pass"))
    before = copy.deepcopy(tiny_engine.model.generation_config)
    yield
    hook.remove()
    assert tiny_engine.model.generation_config == before and "forward" not in tiny_engine.model.__dict__


def doors(engine):
    """What takes arguments of generation."""
    return (
        lambda **kwargs: engine.generate("w5", **kwargs),
        lambda **kwargs: engine.generate("w5", prefill_chunk_size=64, **kwargs),
        lambda **kwargs: engine.stream("w5", **kwargs),
        lambda **kwargs: engine.chat(**kwargs),
        lambda **kwargs: engine.answer(engine.prepare_request("w5"), **kwargs),
    )


def named(kwargs):
    """What pytest calls the case: the same in every process, so without addresses."""
    return " ".join(f"{k}={v!r:.30}".partition(" at 0x")[0] for k, v in kwargs.items())


@pytest.mark.parametrize("kwargs", WRONG, ids=named)
def test_wrong_arguments_are_refused_by_name_before_any_pass(tiny_engine, no_pass, kwargs):
    chat, config = tiny_engine.chat(), kwargs.get("generation_config")
    names = "max_new_tokenz|penalty_alpha" if isinstance(config, GenerationConfig) else "|".join(kwargs)
    asks = list(doors(tiny_engine))
    if kwargs != {"max_new_tokens": None}:  # a turn is then as long as the chat says
        asks.append(lambda **kwargs: chat.send("w5", **kwargs))
    for ask in asks:
        with pytest.raises(InputError, match=names) as caught:
            ask(**kwargs)
        assert len(str(caught.value)) < 700
    assert chat.cache.tokens == ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(tiny_engine, no_pass, name):
    """Given in the call, or in a generation config; a checkpoint's own config may hold what does nothing by itself."""
    value = "x" if name not in HARMLESS else not HARMLESS[name][0]
    for ask in doors(tiny_engine) if name != "prefill_chunk_size" else ():  # which is an argument of ours
        with pytest.raises(InputError, match=rf"{name}=.*not supported, for .*Leave it out"):
            ask(**{name: value})
    if name not in OF_CONFIG:
        return
    config = GenerationConfig()
    setattr(config, name, value)
    with pytest.raises(InputError, match=name):
        tiny_engine.generate("w5", generation_config=config)


@pytest.mark.parametrize("name", sorted(OF_CONFIG))
def test_a_checkpoints_own_setting_is_honoured_or_refused_unless_it_does_nothing(
    tiny_engine, no_pass, monkeypatch, name
):
    monkeypatch.setattr(tiny_engine.model.generation_config, name, "x")
    if name in IDLE or (name in HARMLESS and name != "use_cache") or is_honoured(name):
        return
    with pytest.raises(InputError, match=rf"the model's generation config has {name}='x'.*Pass {name}="):
        tiny_engine.runner.settings({})


def test_an_argument_stands_in_one_class():
    classes = [set(NUMBERS), set(SWITCHES), set(HARMLESS), set(REASONS)]
    assert all(not (a & b) for n, a in enumerate(classes) for b in classes[:n])
    assert not any(is_honoured(name) for name in {*HARMLESS, *REASONS, *IDLE})


def test_what_a_later_host_brings_is_refused(tiny_engine, no_pass, monkeypatch):
    """Whether the call has it, a generation config, or the checkpoint."""
    made = GenerationConfig.__init__

    def later(self, **kwargs):
        self.new_setting = kwargs.pop("new_setting", None)
        made(self, **kwargs)

    monkeypatch.setattr(GenerationConfig, "__init__", later)
    for kwargs in ({"new_setting": 1}, {"generation_config": GenerationConfig(new_setting=1)}):
        with pytest.raises(InputError, match="new_setting=1: not supported"):
            tiny_engine.generate("w5", **kwargs)
    monkeypatch.setattr(tiny_engine.model.generation_config, "new_setting", 1, raising=False)
    with pytest.raises(InputError, match="generation config has new_setting=1"):
        tiny_engine.generate("w5")


def test_what_says_nothing_new_is_accepted(tiny_engine):
    said = {name: value for name, (value, _) in HARMLESS.items()}
    off = {"output_attentions": False, "output_scores": False, "cache_implementation": None, "token_healing": False}
    want = tiny_engine.generate("w5", 2).token_ids
    assert tiny_engine.generate("w5", 2, temperature=0.0, **said, **off).token_ids == want
    assert tiny_engine.generate("w5", 2, prefill_chunk_size=64, **dict.fromkeys(said)).token_ids == want


def test_settings_of_a_checkpoint_go_with_its_own_config(tiny_engine, monkeypatch):
    """Those that the host does not know it carries along; so may a config that was made of it."""
    monkeypatch.setattr(tiny_engine.model.generation_config, "chat_format", "chatml", raising=False)
    config = copy.deepcopy(tiny_engine.model.generation_config)
    config.max_new_tokens = 3
    assert len(tiny_engine.generate("w5", generation_config=config, eos_token_id=-1).token_ids) == 3


def test_a_streamer_takes_one_answer(tiny_engine, no_pass):
    streamer = TextStreamer(tiny_engine.processor.tokenizer)
    for size in (None, 64):
        for chats, kwargs in ((["w5", "w6"], {}), ("w5", {"do_sample": True, "num_return_sequences": 2})):
            with pytest.raises(InputError, match="streamer: a TextStreamer takes one answer, and 2"):
                tiny_engine.generate(chats, streamer=streamer, prefill_chunk_size=size, **kwargs)
        with pytest.raises(InputError, match="streamer: an answer of num_beams=2"):
            tiny_engine.generate("w5", streamer=streamer, prefill_chunk_size=size, num_beams=2)
        with pytest.raises(InputError, match="wanted a transformers streamer"):
            tiny_engine.generate("w5", streamer=5, prefill_chunk_size=size)


def test_end_tokens_come_in_any_form(tiny_engine):
    wanted = {None: (), -1: (-1,), 5: (5,), (5, 6): (5, 6)}
    for given, ids in wanted.items():
        value = list(given) if isinstance(given, tuple) else given
        forms = [value] if value is None else [value, torch.tensor(value)]
        for form in forms:
            assert tiny_engine.runner.settings({"eos_token_id": form}).end_ids == frozenset(ids)
