"""The language model's structured start: close to one that retrieves, so that minutes of CPU suffice.

Retrieval from a context (gather a label into what follows it, match the question with it, copy the answer) is
slow to emerge from a random start. `init_language_model` lays the three steps down roughly in layers 0 to 2;
training then tunes them together with everything else. The residual stream (192 wide) starts out divided so:

  0-15    class space: digits and colours, for visual tokens and for words alike
  16-91   identity of the other tokens (random embeddings)
  94, 95  flags "visual token" and "image label"
  96-127  what the token 3 positions back was          (to be matched: the question side)
  128-159 the label or word this token belongs to      (to be matched: the context side)
  160-175 classes named 3 and 4 positions back         (the question side of Q1)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer

from mminfer.errors import ConfigError
from mminfer.nano import data
from training.nano import build

WIDTH, HEADS, GROUPS, HEAD_DIM = 192, 6, 2, 32
CLASS, NAME = slice(0, 16), slice(16, 92)
VISUAL, LABEL = 94, 95
ASKED, OWNER, ASKED_CLASS = slice(96, 128), slice(128, 160), slice(160, 176)
SLOW = torch.tensor([*range(8, 16), *range(24, 32)])  # head dimensions that hardly rotate


@torch.no_grad()
def init_language_model(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, class_vectors: torch.Tensor
) -> None:
    """Write the structured start into the model's projector and language model.

    Args:
        model: a nano model; its language model is overwritten.
        tokenizer: its tokenizer.
        class_vectors: directions of 10 digits and 6 colours among the visual tokens, from the vision stage
            [16, 192]; they define the class space.

    Raises:
        ConfigError: the model is not of the nano size.
    """
    lm = model.model.language_model
    size = (lm.config.hidden_size, lm.config.num_attention_heads, lm.config.num_key_value_heads)
    if size != (WIDTH, HEADS, GROUPS):
        raise ConfigError(
            f"width, query heads and key/value heads are {size}; the structured start is laid out for "
            f"{(WIDTH, HEADS, GROUPS)}: build the model with build_model's default width"
        )
    basis = _rotate_projector(model.model.multi_modal_projector, class_vectors)
    _init_embedding(lm.embed_tokens.weight, tokenizer, class_vectors @ basis[:, :16])
    quieten(lm.layers)
    project = torch.randn(HEAD_DIM, 76) / 76**0.5
    _gather(lm.layers[0].self_attn, lm.rotary_emb.inv_freq, project)
    _match_names(lm.layers[1].self_attn, project)
    _match_classes(lm.layers[2].self_attn, project)


def _rotate_projector(projector: InternVLMultiModalProjector, class_vectors: torch.Tensor) -> torch.Tensor:
    """Turn class space to the first 16 dimensions of what the projector puts out."""
    basis, _ = torch.linalg.qr(torch.cat([class_vectors.T, torch.randn(WIDTH, 80 - 16)], 1))
    keep = torch.zeros(WIDTH, WIDTH)
    keep[:80] = basis.T
    projector.linear_2.weight.copy_(keep @ projector.linear_2.weight)
    projector.linear_2.bias.copy_(keep @ projector.linear_2.bias)
    projector.linear_2.bias[VISUAL] = 0.8
    return basis


def _init_embedding(embedding: torch.Tensor, tokenizer: PreTrainedTokenizerBase, classes: torch.Tensor) -> None:
    embedding.zero_()
    embedding[:, NAME] = torch.randn(len(embedding), 76) * 0.3
    ids = [tokenizer(word).input_ids[0] for word in data.DIGIT_NAMES + data.COLOUR_NAMES]
    embedding[ids] = 0.0
    embedding[ids, CLASS] = torch.nn.functional.normalize(classes, dim=1) * 2.5
    embedding[[tokenizer(label).input_ids[0] for label in data.IDS], LABEL] = 0.8
    embedding[tokenizer.convert_tokens_to_ids(build.IMG_END), VISUAL] = 0.8


def quieten(layers: Iterable[Qwen2DecoderLayer]) -> None:
    """Small random weights everywhere, so that the retrieval layers stand out."""
    for layer in layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.normal_(0.0, 0.04)
            linear.bias.zero_()
        attention.o_proj.weight.normal_(0.0, 0.01)
        layer.mlp.down_proj.weight.normal_(0.0, 0.01)


def views(attention: Qwen2Attention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights by head: query [H, D, C], key and value [G, D, C], output [C, H, D]."""
    return (
        attention.q_proj.weight.view(HEADS, HEAD_DIM, WIDTH),
        attention.k_proj.weight.view(GROUPS, HEAD_DIM, WIDTH),
        attention.v_proj.weight.view(GROUPS, HEAD_DIM, WIDTH),
        attention.o_proj.weight.view(WIDTH, HEADS, HEAD_DIM),
    )


def _gather(attention: Qwen2Attention, frequency: torch.Tensor, project: torch.Tensor) -> None:
    """Layer 0: biases in the highest frequencies make a head look k positions back."""
    query, key, value, output = views(attention)
    query_bias = attention.q_proj.bias.view(HEADS, HEAD_DIM)
    key_bias = attention.k_proj.bias.view(GROUPS, HEAD_DIM)
    size = (16.0 * HEAD_DIM**0.5 / 4) ** 0.5
    key_bias[:, :4] = size
    for head, offset in ((1, 3), (2, 2), (4, 3), (5, 4)):
        query[head] = 0
        query_bias[head, :4] = size * (offset * frequency[:4]).cos()
        query_bias[head, 16:20] = -size * (offset * frequency[:4]).sin()
    value[0] = 0
    value[0][:, NAME] = project
    output[:, 0:3] = 0
    output[ASKED, 1] = torch.eye(HEAD_DIM) * 0.4
    output[OWNER, 2] = torch.eye(HEAD_DIM) * 0.25
    output[OWNER, 0] = torch.eye(HEAD_DIM) * 0.6
    # Head 0: visual tokens look for the latest image label (middle frequencies: recency).
    key[0], query[0] = 0, 0
    key[0][4:9, LABEL] = 1.2
    query[0][4:9, VISUAL] = 1.2 * (3 * frequency[4:9]).cos()
    query[0][20:25, VISUAL] = -1.2 * (3 * frequency[4:9]).sin()
    value[1] = 0
    value[1][:16, CLASS] = torch.eye(16)
    output[:, 4:6] = 0
    output[ASKED_CLASS, 4:6, :16] = torch.eye(16)[:, None] * 0.4


def _match_names(attention: Qwen2Attention, project: torch.Tensor) -> None:
    """Layer 1: match labels and words; copy names (group 0) and classes (group 1)."""
    query, key, value, output = views(attention)
    for group, head in ((0, 0), (1, 3)):
        query[head], key[group], value[group], output[:, head] = 0, 0, 0, 0
        half = slice(16 * group, 16 * group + 16)
        query[head][SLOW, ASKED] = torch.eye(HEAD_DIM)[half] * 1.6
        key[group][SLOW, OWNER] = torch.eye(HEAD_DIM)[half] * 1.6
    value[0][:, NAME] = project
    output[NAME, 0] = project.T * 0.4
    value[1][:16, CLASS] = torch.eye(16)
    output[CLASS, 3, :16] = torch.eye(16) * 0.4


def _match_classes(attention: Qwen2Attention, project: torch.Tensor) -> None:
    """Layer 2: match classes; copy the label of the image."""
    query, key, value, output = views(attention)
    for group, head in ((0, 0), (1, 3)):
        query[head], key[group], value[group], output[:, head] = 0, 0, 0, 0
        query[head][SLOW, ASKED_CLASS] = torch.eye(16) * 1.2
        key[group][SLOW, CLASS] = torch.eye(16) * 1.2
        value[group][:, OWNER] = torch.eye(HEAD_DIM)
        output[NAME, head] = project.T * 0.4
