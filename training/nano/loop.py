"""What the training loop goes by: a log, an optimizer with a budget of time, a curriculum."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.nano.batches import Batch

CURRICULUM = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28]
WARMUP_STEPS = 30


class Log:
    """Append-only JSON lines, plus an echo on stdout."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, **record: Any) -> None:
        echo = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items())
        print(" ".join(echo), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Optimizer:
    """AdamW with clipped gradients for a budget of time.

    Weight decay on matrices only (not on norms, biases and embeddings). The learning rate warms up in steps,
    then decays linearly in the fraction of the budget that is spent.
    """

    def __init__(self, modules: list[nn.Module], lr: float, minutes: float, floor: float):
        named = [(n, p) for n, p in nn.ModuleList(modules).named_parameters() if p.requires_grad]
        decay = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named if p.ndim != 2 or "embed" in n]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), foreach=True)
        self.parameters = decay + rest
        self.peak, self.floor, self.budget_s = lr, floor, minutes * 60
        self.steps = 0
        self.start = time.time()

    @property
    def elapsed_s(self) -> float:
        """Seconds of the budget that are spent."""
        return time.time() - self.start

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        warmup = min(1.0, (self.steps + 1) / WARMUP_STEPS)
        return self.peak * warmup * max(self.floor, 1.0 - self.elapsed_s / self.budget_s)

    def step(self, loss: torch.Tensor) -> None:
        """One update."""
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.steps += 1


class Progress:
    """Where the curriculum stands, and means over the batches since the last report."""

    def __init__(self, level: int, advance: float):
        self.level, self.advance = level, advance
        self.accuracy = 0.0  # moving average at the current maximum number of images
        self.tokens = 0
        self.losses: list[float] = []
        self.hits: dict[str, list[float]] = {}

    @property
    def max_images(self) -> int:
        """The largest number of images in a context."""
        return CURRICULUM[self.level]

    def count(self, **hits: float) -> None:
        """Add one observation of each name."""
        for name, hit in hits.items():
            self.hits.setdefault(name, []).append(hit)

    def update(self, batch: Batch, at_answer: torch.Tensor, loss: float) -> None:
        """Count a batch's right answers; let contexts grow once enough of them are right."""
        self.tokens += batch.input_ids.numel()
        self.losses.append(loss)
        correct = (at_answer.argmax(-1) == batch.answers).flatten().tolist()
        for task, hit in zip(batch.tasks, correct, strict=True):
            self.count(**{batch.prefix + task: hit})
        if batch.num_images == self.max_images and not batch.num_frames:
            self.accuracy += 0.05 * (sum(correct) / len(correct) - self.accuracy)
            if self.accuracy > self.advance and self.level + 1 < len(CURRICULUM):
                self.level, self.accuracy = self.level + 1, max(0.0, self.accuracy - 0.15)

    def report(self) -> dict[str, float]:
        """The means, which start anew."""
        record: dict[str, float] = {"tokens": self.tokens, "images": self.max_images}
        record["loss"] = sum(self.losses) / len(self.losses)
        record |= {name: sum(hits) / len(hits) for name, hits in sorted(self.hits.items())}
        self.losses, self.hits = [], {}
        return record
