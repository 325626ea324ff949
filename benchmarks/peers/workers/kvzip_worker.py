"""kvpress on a language model alone, run as a file by the Python of its own environment; knows nothing of mminfer.

kvpress's KVzip takes contexts as text, so pictures come to it as more words of the embedding table: what a model's own
tower makes of them. Everything else is as kvpress's pipeline does it, save that the tokenizer is not loaded anew for
each context, which would be counted as work of the press, and that what a head loses is masked by attention's own mask:
kvpress looks for a key that no query sees, and finds none for a chunk of queries.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import torch
import transformers
from kvpress.presses import kvzip_press
from kvpress_worker import entries, older
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from wire import Prompt, read_prompts, serve

state: dict[str, Any] = {}  # "model", "table", "image_token", "prompts", "ids", "pictures"


def load(checkpoint: str, prompts: str, threads: int, template: bool) -> dict[str, Any]:
    """Language model and prompts; gives the versions of what runs here.

    Args:
        checkpoint: of a model with a tower.
        prompts: a folder.
        threads: of torch.
        template: whether contexts stand in the checkpoint's chat template; otherwise they are plain text.
    """
    torch.set_num_threads(threads)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    transformers.utils.logging.disable_progress_bar()
    new = int(transformers.__version__.split(".")[0]) >= 5
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint if new else older(checkpoint, folder)
        whole = AutoModelForImageTextToText.from_pretrained(source, attn_implementation="sdpa").float().eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not template:
        tokenizer.chat_template = None
    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tokenizer)
    model, asked = language_model(whole), read_prompts(Path(prompts))
    state.update(model=model, table=model.get_input_embeddings().weight.detach(), prompts=asked)
    with torch.no_grad():
        made = [as_words(whole, prompt) for prompt in asked]
    state.update(ids=[ids for ids, _ in made], pictures=[rows for _, rows in made])
    return {name: metadata.version(name) for name in ("kvpress", "torch", "transformers")}


def language_model(whole: Any) -> Any:
    """The language model of one with a tower, as a model of its own."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole.config.text_config, attn_implementation="sdpa")
    model.lm_head = whole.lm_head
    model.model = whole.model.language_model
    return model.float().eval()


def as_words(whole: Any, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, N] in which each place of a picture is a word of its own, and the rows of these words."""
    ids, width = torch.tensor([prompt.input_ids]), state["table"].shape[1]
    if not prompt.pixel_values.numel():
        return ids, state["table"][:0]
    found = whole.model.get_image_features(pixel_values=prompt.pixel_values)
    rows = getattr(found, "pooler_output", found).reshape(-1, width)
    ids[ids == whole.config.image_token_id] = len(state["table"]) + torch.arange(len(rows))
    return ids, rows


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Any:
    """The host's attention, which does not see what a press masked; a first forward begins a context without masks.

    Args:
        module: attention of a layer, on which presses leave what they mask.
        query: [B, H, Q, D].
        key: [B, G, K, D].
        value: [B, G, K, D].
        attention_mask: [B, 1, Q, K], true or 0 where it may look; None: one query, which sees all.
        dropout: of the weights.
        kwargs: of the host.
    """
    if query.shape[2] == key.shape[2]:
        module.masked_key_indices = None
    masked = getattr(module, "masked_key_indices", None)
    if masked is not None:
        seen = torch.ones(key.shape[:3], dtype=torch.bool)
        seen[masked] = False
        seen = seen.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
        if attention_mask is None:
            attention_mask = seen
        elif attention_mask.dtype == torch.bool:
            attention_mask = attention_mask & seen
        else:
            attention_mask = attention_mask.masked_fill(~seen, torch.finfo(attention_mask.dtype).min)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)


class KVzip(kvpress.KVzipPress):
    """kvpress's own where it compresses once; where it compresses again, what is masked stays masked and takes no
    weight while the rest is scored."""

    def _compute_cross_attention(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self._masked = getattr(module, "masked_key_indices", None)
        return super()._compute_cross_attention(module, *args, **kwargs)

    def _mask_causal(self, attn_weights: torch.Tensor, window_size: int) -> None:
        super()._mask_causal(attn_weights, window_size)
        if self._masked is not None:
            _, heads, places = self._masked
            scored = (places >= self.start_idx) & (places < self.end_idx)
            columns = min(self.n_sink, self.start_idx) + places[scored] - self.start_idx
            attn_weights[0, heads[scored], :, :, columns] = torch.finfo(attn_weights.dtype).min

    def compress_post(self, model: Any) -> None:
        for layer, module in enumerate(attentions()):
            masked = getattr(module, "masked_key_indices", None)
            if masked is not None:
                _, heads, places = masked
                self.score_val[layer, 0, heads, places] = -1.0  # below every other
        super().compress_post(model)


def made_press(name: str | None, arguments: dict[str, Any]) -> Any:
    """A press of kvpress; an argument that is itself a press is [its name, its arguments]."""
    if name is None:
        return None
    own = {key: made_press(*value) if isinstance(value, list) else value for key, value in arguments.items()}
    return KVzip(**own) if name == "KVzipPress" else getattr(kvpress, name)(**own)


@torch.no_grad()
def tell(
    prompt: int, press: str | None, arguments: dict[str, Any], tokens: int, chunks: list[int], timed: bool, out: str
) -> dict[str, Any]:
    """What it says to each question, so many tokens of it, and logits [answers, tokens, vocabulary] of the answers that
    the prompt forces upon the first questions, into a file.

    Args:
        prompt: its number.
        press: its class; None: nothing is compressed.
        arguments: of the press.
        tokens: of an answer.
        chunks: lengths of the pieces in which the context is read and compressed.
        timed: whether the prompt pass is timed alone as well.
        out: the file.
    """
    asked, made = state["prompts"][prompt], made_press(press, arguments)
    forced = [n for n, tokens_of in enumerate(asked.answers) if tokens_of]
    with known(prompt) as ids:
        pass_s = took(lambda: read(ids, chunks, None))[1] if timed else 0.0
        cache, read_s = took(lambda: read(ids, chunks, made))
        figures = {"tokens": ids.shape[1], "entries": entries(cache), "masked": masked_share()}
        answers = [asked.answers[n] for n in forced]
        logits = answer(cache, ids.shape[1], [asked.questions[n] for n in forced], len(answers[0]), answers)[1]
        said = answer(cache, ids.shape[1], asked.questions, tokens, None)[0]
    save_file({"logits": logits}, out)
    return {**figures, "pass_s": pass_s, "read_s": read_s, "said": said.tolist()}


def took(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the processor's seconds."""
    start = time.process_time()
    made = run()
    return made, time.process_time() - start


@contextmanager
def known(prompt: int) -> Iterator[torch.Tensor]:
    """A prompt's token ids, of which the model knows all words."""
    rows = torch.cat([state["table"], state["pictures"][prompt]])
    state["model"].set_input_embeddings(nn.Embedding.from_pretrained(rows))
    yield state["ids"][prompt]


def read(ids: torch.Tensor, chunks: list[int], press: Any) -> Any:
    """The cache of a context that was read in chunks, each compressed behind it.

    KVzip takes the last forward's tokens for the whole context: where there are several, it is told of all so far, and
    goes through them again. Other presses leave alone whatever comes after the first forward.

    Raises:
        ValueError: a press that does not compress later chunks.
    """
    if press is not None and len(chunks) > 1 and not isinstance(press, kvpress.KVzipPress):
        raise ValueError(f"{type(press).__name__} compresses behind the first forward alone")
    model, cache, stop = state["model"], DynamicCache(), 0
    for chunk in chunks:
        with nullcontext() if press is None else press(model):
            model.model(input_ids=ids[:, stop : stop + chunk], past_key_values=cache)
            stop += chunk
            if isinstance(press, kvpress.KVzipPress):
                press._context_ids = ids[:, :stop]
    return cache


def answer(
    cache: Any, position: int, questions: list[list[int]], tokens: int, forced: list[list[int]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, tokens] that are likeliest behind questions, and their logits [B, tokens, vocabulary].

    Args:
        cache: of the context; a copy goes on.
        position: of the questions' first token.
        questions: token ids of each, B; shorter ones have masked places before them.
        tokens: of an answer.
        forced: token ids of answers to go on with; None: with the likeliest tokens.
    """
    own, count, longest = copy.deepcopy(cache), len(questions), max(map(len, questions))
    own.batch_repeat_interleave(count)
    before = torch.tensor([[longest - len(question)] for question in questions])
    ids = torch.tensor([[0] * (longest - len(question)) + question for question in questions])
    real = torch.cat([torch.ones(count, position, dtype=torch.long), (torch.arange(longest) >= before).long()], dim=1)
    positions = position + (torch.arange(longest) - before).clamp(min=0)
    said: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    with masked_for(count):
        for step in range(tokens):
            inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": real, "past_key_values": own}
            rows.append(state["model"](**inputs, logits_to_keep=1).logits[:, -1])
            said.append(rows[-1].argmax(-1))
            ids = said[-1][:, None] if forced is None else torch.tensor([[answer[step]] for answer in forced])
            positions = positions[:, -1:] + 1
            real = torch.cat([real, real.new_ones(count, 1)], dim=1)
    return torch.stack(said, 1), torch.stack(rows, 1)


@contextmanager
def masked_for(batch: int) -> Iterator[None]:
    """What kvpress masks of one sequence, masked of so many copies of it."""
    before = {module: getattr(module, "masked_key_indices", None) for module in attentions()}
    for module, masked in before.items():
        if masked is not None:
            count = len(masked[1])
            rows = torch.arange(batch).repeat_interleave(count)
            module.masked_key_indices = (rows, masked[1].repeat(batch), masked[2].repeat(batch))
    try:
        yield
    finally:
        for module, masked in before.items():
            module.masked_key_indices = masked


def masked_share() -> float:
    """Entries that are held and masked, a head, mean over layers and heads."""
    found = [getattr(module, "masked_key_indices", None) for module in attentions()]
    heads = state["model"].config.num_key_value_heads
    return sum(len(masked[1]) for masked in found if masked is not None) / (heads * len(found))


def attentions() -> list[Any]:
    return [layer.self_attn for layer in state["model"].model.layers]


if __name__ == "__main__":
    serve({"load": load, "tell": tell})
