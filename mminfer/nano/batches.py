"""Training batches of the nano model: chats as token ids, the plan of their questions, V2PE positions."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mminfer.nano import build, data

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


class Encoder:
    """Token ids of a context and its question/answer turns, as the chat template gives them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        vocab = tokenizer.get_vocab()
        self.user, self.assistant, self.end = vocab[build.USER], vocab[build.ASSISTANT], vocab[build.END]
        self.image = vocab[build.IMG_CONTEXT]
        visual = [self.image] * build.TOKENS_PER_IMAGE
        self.picture = [vocab[build.IMG_START], *visual, vocab[build.IMG_END]]

    def text(self, text: str) -> list[int]:
        """Token ids of one text part."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text).input_ids
        return self.cache[text]

    def context(self, context: data.Context) -> list[int]:
        """The user's turn up to the question."""
        ids = [self.user]
        for item in context.items:
            ids += self.text(item.text)
            if isinstance(item, data.ImageItem):
                ids += self.picture
        return ids

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


@dataclass(frozen=True)
class Batch:
    """Equally shaped conversations; K questions in each."""

    input_ids: torch.Tensor  # [B, N]
    prompts: torch.Tensor  # positions of the generation prompts' last tokens [B, K]
    delta: torch.Tensor  # V2PE increment of each conversation [B]
    images: torch.Tensor  # indices into the bank of pictures, row after row
    tasks: list[str]  # B * K
    num_images: int

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
        counts = turn_plan(rng, num_images, num_facts)
        length = (5 + build.TOKENS_PER_IMAGE) * num_images + 7 * num_facts + 12 * len(counts)
        ids, prompts, deltas, picks, tasks = [], [], [], [], []
        tokens = self.tokens if max_images > 4 else self.tokens // 2  # small steps while contexts are short
        for _ in range(max(1, tokens // length)):
            plan = rng.sample(counts, len(counts))
            context = data.sample_context(rng, num_images, num_facts, plan)
            row_ids, row_prompts = self.encoder.conversation(context)
            ids.append(row_ids)
            prompts.append(row_prompts)
            deltas.append(sample_delta(rng))
            picks += [self.bank.sample(i.digit, i.colour, rng) for i in context.images]
            tasks += [q.task for q in context.questions]
        return Batch(
            input_ids=torch.tensor(ids),
            prompts=torch.tensor(prompts),
            delta=torch.tensor(deltas),
            images=torch.tensor(picks),
            tasks=tasks,
            num_images=num_images,
        )
