"""Training batches of the nano model: chats as token ids, the plan of their questions, positions.

Long contexts come from short sequences: a frame may be *condensed*, that is stand for m equal frames in a row. The
keys of its tokens then weigh m times in the softmax of every later token (a bias of log m on the scores), and what
follows it stands m - 1 frames further on.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mminfer.nano import data
from mminfer.positions.v2pe import v2pe_positions as paper_positions
from training.nano import build

WINDOW = build.WINDOW  # positions that training may use
MAX_FRAMES = 8192  # frames that a training context may stand for
DELTAS = [1.0] + [2.0**-k for k in range(1, 9)]  # 1, 1/2, ..., 1/256


def sample_delta(rng: random.Random) -> float:
    """A V2PE increment: 1 with probability 0.4, else one of 1/2 ... 1/256."""
    return 1.0 if rng.random() < 0.4 else rng.choice(DELTAS[1:])


def v2pe_positions(is_visual: torch.Tensor, delta: torch.Tensor | float) -> torch.Tensor:
    """A token's position is the sum of the steps before it: 1 after text, delta after a visual token.

    Args:
        is_visual: which tokens are visual, bool [B, N].
        delta: one increment for all sequences, or one each [B].

    Returns:
        float32 [B, N].
    """
    if not isinstance(delta, torch.Tensor):
        delta = torch.full((is_visual.shape[0],), delta)
    step = torch.where(is_visual, delta[:, None], 1.0)
    return torch.cumsum(step, 1, dtype=torch.float64).sub(step).float()


def condensed_positions(
    is_visual: torch.Tensor, ends: torch.Tensor, copies: torch.Tensor, delta: float, paper: bool
) -> torch.Tensor:
    """Positions of one sequence in which some frames stand for several.

    Args:
        is_visual: which tokens are visual, bool [N].
        ends: which tokens end a picture, bool [N].
        copies: how many equal frames the frame of a token stands for; 1 elsewhere; [N].
        delta: the V2PE increment.
        paper: the rule of the V2PE paper (what `mminfer.V2PE` does) instead of `v2pe_positions`.

    Returns:
        float32 [N].
    """
    position = (paper_positions if paper else v2pe_positions)(is_visual[None], delta)[0].double()
    extent = build.TOKENS_PER_IMAGE * delta
    extent = math.ceil(extent) if paper else extent
    jump = torch.where(ends, (copies - 1.0) * (2 + extent), 0.0).double()
    return (position + jump.cumsum(0) - jump).float()


def attention_bias(items: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    """Causal scores' bias: log m on the keys of a frame that stands for m, but not among its own tokens.

    Args:
        items: which item of the context a token belongs to [B, N].
        copies: how many equal frames that item stands for [B, N].

    Returns:
        float32 [B, 1, N, N].
    """
    bias = copies.float().log()[:, None, :].where(items[:, :, None] != items[:, None, :], 0.0)
    future = torch.ones(bias.shape[1:], dtype=torch.bool).triu(1)
    return bias.masked_fill(future, -torch.inf)[:, None]


class Encoder:
    """Token ids of a context and its question/answer turns, as the chat template gives them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        vocab = tokenizer.get_vocab()
        self.user, self.assistant, self.end = vocab[build.USER], vocab[build.ASSISTANT], vocab[build.END]
        self.image = vocab[build.IMG_CONTEXT]
        visual = [self.image] * build.TOKENS_PER_IMAGE
        self.image_end = vocab[build.IMG_END]
        self.picture = [vocab[build.IMG_START], *visual, self.image_end]

    def text(self, text: str) -> list[int]:
        """Token ids of one text part."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text).input_ids
        return self.cache[text]

    def context(self, context: data.Context) -> list[int]:
        """The user's turn up to the question."""
        return [self.user, *(token for item in context.items for token in self.item(item))]

    def item(self, item: data.Item) -> list[int]:
        """One item of a context."""
        text = self.text(item.text) if item.text else []
        return text if isinstance(item, data.FactItem) else text + self.picture

    def copies(self, context: data.Context, length: int) -> tuple[list[int], list[int]]:
        """The item of each token of a conversation of that length, and how many frames it stands for."""
        items, copies = [0], [1]
        for n, item in enumerate(context.items):
            size = len(self.item(item))
            items += [n + 1] * size
            copies += [item.copies if isinstance(item, data.FrameItem) else 1] * size
        rest = length - len(items)
        return items + [0] * rest, copies + [1] * rest

    def question(self, question: data.Question) -> list[int]:
        """The question up to the generation prompt; the next token is the answer."""
        return [*self.text(question.text), self.end, self.assistant]

    def answer(self, question: data.Question) -> int:
        """The answer's only token."""
        (token,) = self.text(question.answer)
        return token

    def conversation(self, context: data.Context) -> tuple[list[int], list[int]]:
        """All turns; also the positions of the generation prompts' last tokens."""
        ids, prompts = self.context(context), []
        for n, question in enumerate(context.questions):
            ids += ([self.user] if n else []) + self.question(question)
            prompts.append(len(ids) - 1)
            ids += [self.answer(question), self.end]
        return ids, prompts


def turn_plan(rng: random.Random, num_images: int, num_facts: int) -> list[str]:
    """Which questions to ask: every image and every fact is asked about at most once."""
    num_q1 = min(5, rng.choice([num_images // 2, (num_images + 1) // 2]))
    num_q2 = min(6, num_images - num_q1)
    num_q3 = min(4, num_facts)
    q2 = rng.choices(["q2_digit", "q2_colour"], [3, 1], k=num_q2)  # reading digits is the hard part
    tasks = ["q1"] * num_q1 + q2 + ["q3"] * num_q3
    tasks += ["q1_none"] * (1 if num_images >= 6 or (num_images > 1 and rng.random() < 0.35) else 0)
    rng.shuffle(tasks)
    return tasks


def condense(rng: random.Random, context: data.Context, delta: float) -> None:
    """Let the frames stand for up to `MAX_FRAMES` in all, as many as fit into the window (or let them be)."""
    frames = context.frames
    extent = 2 + math.ceil(build.TOKENS_PER_IMAGE * delta)
    used = (4 + extent) * len(context.pictures) + 8 * len(context.facts) + 12 * len(context.questions)
    more = min(MAX_FRAMES, (WINDOW - used) // extent) - len(frames)
    if more < 1 or rng.random() < 0.25:
        return
    total = math.exp(rng.uniform(0.0, math.log(more)))
    weights = [rng.expovariate(1.0) for _ in frames]
    for frame, weight in zip(frames, weights, strict=True):
        frame.copies = 1 + int(total * weight / sum(weights))


@dataclass(frozen=True)
class Batch:
    """Equally shaped conversations; K questions in each."""

    input_ids: torch.Tensor  # [B, N]
    prompts: torch.Tensor  # positions of the generation prompts' last tokens [B, K]
    positions: torch.Tensor  # [B, N]
    bias: torch.Tensor | None  # of the attention scores [B, 1, N, N]; None: causal
    pictures: torch.Tensor  # indices into the bank of pictures, row after row
    tasks: list[str]  # B * K
    num_images: int
    num_frames: int

    @property
    def prefix(self) -> str:
        """Of the tasks' names in the log."""
        return "frames_" if self.num_frames else ""

    @property
    def answers(self) -> torch.Tensor:
        """The right answers' tokens [B, K]."""
        rows = torch.arange(len(self.input_ids))[:, None]
        return self.input_ids[rows, self.prompts + 1]


class Batches:
    """Random batches of equally shaped conversations."""

    def __init__(self, encoder: Encoder, bank: data.ImageBank, rng: random.Random, tokens: int):
        self.encoder, self.bank, self.rng, self.tokens = encoder, bank, rng, tokens

    def next(self, max_images: int) -> Batch:
        """A batch of contexts with at most so many images; a quarter of the batches has exactly so many."""
        rng = self.rng
        at_most = rng.random() < 0.25  # the rest is log-uniform below
        num_images = max_images if at_most else int(math.exp(rng.uniform(0, math.log(max_images + 1))))
        num_facts = rng.randint(1, max(min(4, 1 + max_images), min(10, num_images // 2)))
        tokens = self.tokens if max_images > 4 else self.tokens // 2  # small steps while contexts are short
        return self.batch(num_images, num_facts, 0, tokens)

    def next_frames(self, max_pictures: int) -> Batch:
        """A batch of contexts with frames between the labelled images, most of them condensed."""
        rng = self.rng
        num_pictures = rng.randint(max_pictures // 4, max_pictures)
        num_images = rng.randint(1, num_pictures * 3 // 4)
        return self.batch(num_images, rng.randint(1, 8), num_pictures - num_images, self.tokens)

    def batch(self, num_images: int, num_facts: int, num_frames: int, tokens: int) -> Batch:
        """A batch of about so many tokens."""
        rng = self.rng
        counts = turn_plan(rng, num_images, num_facts)
        length = (5 + build.TOKENS_PER_IMAGE) * (num_images + num_frames) + 7 * num_facts + 12 * len(counts)
        rows: list[list[torch.Tensor]] = []
        picks, tasks = [], []
        for _ in range(max(1, tokens // length)):
            plan = rng.sample(counts, len(counts))
            runs = rng.randint(1, num_images + num_facts + 1)
            context = data.sample_context(rng, num_images, num_facts, plan, num_frames, runs, rng.random() < 0.3)
            rows.append(self._row(context))
            picks += [self.bank.sample(i.digit, i.colour, rng) for i in context.pictures]
            tasks += [q.task for q in context.questions]
        ids, prompts, positions, items, copies = (torch.stack(column) for column in zip(*rows, strict=True))
        return Batch(
            input_ids=ids,
            prompts=prompts,
            positions=positions,
            bias=attention_bias(items, copies) if copies.max() > 1 else None,
            pictures=torch.tensor(picks),
            tasks=tasks,
            num_images=num_images,
            num_frames=num_frames,
        )

    def _row(self, context: data.Context) -> list[torch.Tensor]:
        """Token ids, prompts, positions, items and copies of one conversation."""
        rng = self.rng
        delta = sample_delta(rng)
        if context.frames:
            condense(rng, context, delta)
        ids, prompts = (torch.tensor(x) for x in self.encoder.conversation(context))
        items, copies = (torch.tensor(x) for x in self.encoder.copies(context, len(ids)))
        visual, ends = ids == self.encoder.image, ids == self.encoder.image_end
        return [ids, prompts, condensed_positions(visual, ends, copies, delta, rng.random() < 0.5), items, copies]
