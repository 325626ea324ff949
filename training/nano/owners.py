"""The language model's start of the "frames" stage: `<img>` tells the visual tokens behind it whose picture they are.

After the joint stage a visual token takes the latest image label for its own (layer 0, head 0), so a picture without
a label would belong to the last labelled one. `<img>` can know better, since a label of its picture stands exactly
two tokens back. So in layer 0 that head now serves `<img>` alone, which looks for such a label, and behind layer 0 a
layer is put in where visual tokens look for the latest `<img>` and take over the label it found. One head copies
the label, another one the mere fact that there is one. The last layer, which does next to nothing, goes, so the model
keeps its size.

The new heads are fitted, not trained: what marks a visual token and an `<img>`, and how the label is read from the
`<img>`, by least squares on hidden states; queries and scores over distances by a few steps of gradient descent.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model, apply_rotary_pos_emb

from mminfer.nano import data
from training.nano import build
from training.nano.batches import DELTAS, WINDOW, Batch, Batches
from training.nano.retrieval import HEAD_DIM, WIDTH, quieten, views

RIDGE = 1e-4
LABELLED = 93  # flag "picture with a label"; see retrieval.py for the other dimensions


@torch.no_grad()
def insert_owner_layer(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, visual: torch.Tensor, batches: Batches
) -> None:
    """Put the new layer in behind layer 0; drop the last one.

    Args:
        model: a nano model after the joint stage; its language model is changed.
        tokenizer: its tokenizer.
        visual: visual tokens of the bank of pictures [pictures, 64, C].
        batches: contexts to fit on.
    """
    lm = model.model.language_model
    first, new = _layer(lm, 0), copy.deepcopy(_layer(lm, -1))
    labels = torch.tensor([tokenizer(label).input_ids[0] for label in data.IDS])
    start = tokenizer.get_vocab()[build.IMG_START]
    contexts = [batches.batch(num_images, 4, 8, batches.tokens) for num_images in (2, 6, 12) * 8]
    inputs = [_inputs(lm, batch, batches.encoder.image, visual) for batch in contexts]
    seekers = [_seeker_view(lm, *pair, start, labels) for pair in zip(contexts, inputs, strict=True)]
    _seek_label(lm, start, _fit_query(seekers), visual)

    ids = torch.cat([batch.input_ids.flatten() for batch in contexts])
    states = torch.cat([_layer0(lm, *pair).flatten(0, 1) for pair in zip(contexts, inputs, strict=True)])
    states = F.rms_norm(states, [WIDTH], eps=lm.config.rms_norm_eps)
    is_visual, is_start = ids.eq(batches.encoder.image), ids.eq(start)
    owned = is_start & torch.isin(ids.roll(2), labels)
    # What layer 0 copies of a label, by its token.
    names = _normed(lm) @ views(first.self_attn)[2][0].T + first.self_attn.v_proj.bias[:HEAD_DIM]
    wanted = torch.where(owned[:, None], names[ids.roll(2)], 0.0)

    quieten([new])
    new.input_layernorm.weight.fill_(1.0)
    query, key, value, output = views(new.self_attn)
    asks, answers = _seek_start(lm.rotary_emb.inv_freq, _ridge(states, is_visual), _ridge(states, is_start))
    for group, head in ((0, 0), (1, 3)):
        query[head], key[group], value[group], output[:, head] = asks, answers, 0, 0
    value[0] = _ridge(states[is_start], wanted[is_start]).T
    output[:, 0] = views(first.self_attn)[3][:, 0]
    value[1][0] = _ridge(states[is_start], owned[is_start])
    output[LABELLED, 3, 0] = 1.0
    order = [first, new, *lm.layers[1:-1]]
    for n, layer in enumerate(order):
        layer.self_attn.layer_idx = n
    lm.layers = nn.ModuleList(order)


def _layer(lm: Qwen2Model, n: int) -> Qwen2DecoderLayer:
    return cast(Qwen2DecoderLayer, lm.layers[n])


def _normed(lm: Qwen2Model, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """What layer 0's attention sees of hidden states, by default of every token of the vocabulary."""
    normed: torch.Tensor = _layer(lm, 0).input_layernorm(lm.embed_tokens.weight if hidden is None else hidden)
    return normed


def _inputs(lm: Qwen2Model, batch: Batch, image: int, visual: torch.Tensor) -> torch.Tensor:
    is_visual = batch.input_ids == image
    return lm.embed_tokens(batch.input_ids).masked_scatter(is_visual[..., None], visual[batch.pictures])


def _layer0(lm: Qwen2Model, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states behind layer 0 [B, N, C]."""
    rotary = lm.rotary_emb(hidden, batch.positions)
    return _layer(lm, 0)(hidden, attention_mask=batch.bias, position_embeddings=rotary)


@dataclass(frozen=True)
class SeekerView:
    """What the `<img>` tokens of a batch see in layer 0, group 0; S of them."""

    keys: torch.Tensor  # rotated [S, N, D]
    cos: torch.Tensor  # at the `<img>` [S, D]
    sin: torch.Tensor
    bias: torch.Tensor  # [S, N]
    two_back: torch.Tensor  # [S]
    is_label: torch.Tensor  # [S, N]


def _seeker_view(lm: Qwen2Model, batch: Batch, hidden: torch.Tensor, start: int, labels: torch.Tensor) -> SeekerView:
    keys = _layer(lm, 0).self_attn.k_proj(_normed(lm, hidden))[..., None, :HEAD_DIM].transpose(1, 2)
    cos, sin = lm.rotary_emb(hidden, batch.positions)
    keys = apply_rotary_pos_emb(keys, keys, cos, sin)[0][:, 0]
    row, place = (batch.input_ids == start).nonzero().T
    causal = torch.zeros(keys.shape[1]).masked_fill(torch.arange(keys.shape[1]) > place[:, None], -torch.inf)
    return SeekerView(
        keys=keys[row],
        cos=cos[row, place],
        sin=sin[row, place],
        bias=causal if batch.bias is None else batch.bias[row, 0, place],
        two_back=(place - 2).clamp(min=0),
        is_label=torch.isin(batch.input_ids, labels)[row],
    )


@torch.enable_grad()
def _fit_query(seekers: list[SeekerView], steps: int = 300) -> torch.Tensor:
    """A query of the `<img>` token that attends to a label two tokens back if there is one, else to no label."""
    query = torch.zeros(HEAD_DIM).normal_(0, 0.1).requires_grad_()
    adam = torch.optim.Adam([query], lr=0.3)
    half = HEAD_DIM // 2
    for step in range(steps):
        view = seekers[step % len(seekers)]
        rotated = query * view.cos + torch.cat([-query[half:], query[:half]]) * view.sin
        scores = torch.einsum("sd,snd->sn", rotated, view.keys) / HEAD_DIM**0.5 + view.bias
        log = scores.log_softmax(1)
        at_label = log.gather(1, view.two_back[:, None])[:, 0]
        at_labels = log.masked_fill(~view.is_label, -1e4).logsumexp(1).clamp(-30, -1e-4)
        owned = view.is_label.gather(1, view.two_back[:, None])[:, 0]
        loss = -torch.where(owned, at_label, torch.log1p(-at_labels.exp())).mean() + 1e-4 * query.square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return query.detach()


def _seek_label(lm: Qwen2Model, start: int, query: torch.Tensor, visual: torch.Tensor) -> None:
    """Layer 0, head 0: this query for `<img>`, none for all other tokens."""
    tokens = torch.cat([_normed(lm), _normed(lm, visual[::50].flatten(0, 1))])
    mine = tokens[start]
    is_start = torch.arange(len(tokens) * 5 // 4) >= len(tokens)  # repeated, since one among thousands is overlooked
    is_start[start] = True
    mark = _ridge(torch.cat([tokens, mine.expand(len(is_start) - len(tokens), -1)]), is_start)
    attention = _layer(lm, 0).self_attn
    views(attention)[0][0] = torch.outer(query, mark / (mark @ mine))
    attention.q_proj.bias[:HEAD_DIM] = 0


def _seek_start(
    frequency: torch.Tensor, visual: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key weights [D, C] by which what looks visual finds the latest of what looks like `<img>`."""
    cosines, sines = fit_distances(frequency)
    size = torch.cat([cosines, sines]).square().mean() ** 0.25
    key = torch.zeros(HEAD_DIM, WIDTH)
    key[: HEAD_DIM // 2] = start * size * HEAD_DIM**0.5
    return torch.outer(torch.cat([cosines, -sines]) / size, visual), key


def _ridge(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Least squares: w such that states @ w is about what is wanted."""
    x, y = states.double(), wanted.double()
    gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=torch.double)
    return torch.linalg.solve(gram, x.T @ y / len(x)).float()


@torch.enable_grad()
def fit_distances(frequency: torch.Tensor, steps: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores over distances d, sum of a cos(w d) + b sin(w d), that single out the latest `<img>` at every delta.

    Args:
        frequency: w of the head's pairs of dimensions [D / 2].
        steps: of gradient descent.

    Returns:
        a and b [D / 2].
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.full((2, len(frequency)), 0.5).requires_grad_()
    adam = torch.optim.Adam([weights], lr=0.05)
    for _ in range(steps):
        loss = 0.01 * weights.square().sum()
        for delta in DELTAS:
            extent = 2 + build.TOKENS_PER_IMAGE * delta
            own = torch.rand(8, 1, generator=generator) * build.TOKENS_PER_IMAGE * delta
            own = own + (torch.rand(8, 1, generator=generator) < 0.5)
            others = torch.cat([torch.arange(1, 33), torch.randint(33, 8192, (224,), generator=generator)])
            distance = torch.cat([own, own + others * extent], 1)  # [8, 257]
            angle = distance[..., None] * frequency
            score = angle.cos() @ weights[0] + angle.sin() @ weights[1]
            score = score.masked_fill(distance > WINDOW, -torch.inf)
            many = score.new_full((8, 1), math.log(WINDOW * 16))  # all other tokens, at score 0
            loss = loss + F.cross_entropy(torch.cat([score, many], 1), torch.zeros(8, dtype=torch.long))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return weights[0].detach(), weights[1].detach()
