"""Train the nano model on CPU in about an hour: `python -m mminfer.nano.train {vision,lm,joint} --minutes M`.

Stages (each one starts from what the one before saved in --out):

  vision  classify digit and colour from the mean of the projected visual tokens
  lm      freeze the vision tower, cache its features for a bank of pictures and train projector + language
          model on the question answering task; the number of images per context grows along a curriculum
  joint   unfreeze everything; the curriculum goes on; an auxiliary loss keeps the visual tokens aligned with
          the embeddings of the words for their digit and colour

In `lm` and `joint` every batch holds sequences of the same shape: one context, then several question/answer
turns; the loss is on the answers (and the end-of-turn token). Every sequence draws its own V2PE increment
`delta`: text tokens advance the RoPE position by 1, visual tokens by delta; delta=1 is the ordinary position.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from mminfer.nano import build, data
from mminfer.nano.batches import Batch, Batches, Encoder, v2pe_positions
from mminfer.nano.retrieval import init_language_model
from mminfer.nano.vision import (
    Alignment,
    Classifier,
    Probe,
    normalise,
    random_pictures,
    reading_accuracy,
    vision_features,
)

CURRICULUM = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28]
WARMUP_STEPS = 30
SAVE_INTERVAL_S = 120


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


class Trainer:
    """A model in training, where it is saved and what it has logged."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: InternVLForConditionalGeneration,
        processor: InternVLProcessor,
    ):
        self.args, self.model, self.processor = args, model, processor
        self.inner, self.projector = model.model, model.model.multi_modal_projector
        self.hidden_size = self.inner.language_model.config.hidden_size
        self.log = Log(args.log)
        self.probe_path = args.out.resolve().parent / "probe.safetensors"

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the vision tower makes of pictures: uint8 [B, 32, 32, 3] -> [B, 64, 96]."""
        return vision_features(self.model, normalise(pixels, self.processor))

    def save(self, probe: Probe | None = None) -> None:
        """Write the checkpoint, and the probe beside it."""
        self.model.save_pretrained(self.args.out)
        self.processor.save_pretrained(self.args.out)
        if probe is not None:
            save_file(probe.state_dict(), self.probe_path)

    def load_probe(self) -> Probe:
        """The probe that the vision stage left."""
        probe = Probe(self.hidden_size)
        probe.load_state_dict(load_file(self.probe_path))
        return probe

    def finish(self, optimizer: Optimizer, classifier: Classifier) -> None:
        """Log how well unseen pictures are read."""
        digit, colour = reading_accuracy(self.model, self.processor, classifier)
        self.log(
            stage=self.args.stage,
            step=optimizer.steps,
            t=optimizer.elapsed_s,
            test_digit=digit,
            test_colour=colour,
        )

    def train_vision(self) -> None:
        """Stage "vision"."""
        args = self.args
        probe = self.load_probe() if args.resume else Probe(self.hidden_size)
        modules = [self.inner.vision_tower, self.projector, probe]
        generator = torch.Generator().manual_seed(args.seed)
        optimizer = Optimizer(modules, args.lr, args.minutes, floor=0.05)
        window = []
        while optimizer.elapsed_s < optimizer.budget_s:
            pixels, digits, colours = random_pictures(128, "train", generator)
            loss, digit_hit, colour_hit = probe(self.projector(self.features(pixels)), digits, colours)
            optimizer.step(loss)
            window.append((loss.item(), digit_hit, colour_hit))
            if optimizer.steps % 50 == 0:
                losses, digit_hits, colour_hits = (sum(x) / len(x) for x in zip(*window, strict=True))
                self.log(
                    stage="vision",
                    step=optimizer.steps,
                    t=optimizer.elapsed_s,
                    loss=losses,
                    digit=digit_hits,
                    colour=colour_hits,
                )
                window = []
            if optimizer.steps % 200 == 0:
                self.save(probe)
        self.finish(optimizer, probe)
        self.save(probe)

    @torch.no_grad()
    def prepare_language_model(self) -> None:
        """From what the vision stage left to the start of the lm stage.

        Visual tokens get the scale of text embeddings (the probe starts with a norm: it does not mind), then
        the language model gets its structured start.
        """
        probe = self.load_probe()
        pixels, *_ = random_pictures(300, "train", torch.Generator().manual_seed(0))
        factor = build.EMBEDDING_STD / self.projector(self.features(pixels)).std()
        self.projector.linear_2.weight.mul_(factor)
        self.projector.linear_2.bias.mul_(factor)
        init_language_model(self.model, self.processor.tokenizer, probe.head.weight * probe.norm.weight)

    def train_answers(self) -> None:
        """Stages "lm" (vision tower frozen, features cached) and "joint" (everything trained)."""
        args, joint = self.args, self.args.stage == "joint"
        if not joint and not args.resume:
            self.prepare_language_model()
        encoder = Encoder(self.processor.tokenizer)
        bank = data.ImageBank(args.bank, "train", seed=args.seed)
        batches = Batches(encoder, bank, random.Random(args.seed), args.batch_tokens)
        alignment = Alignment(self.model, self.processor.tokenizer)
        modules = [self.projector, self.inner.language_model]
        if joint:
            modules += [self.inner.vision_tower, alignment]
        else:
            with torch.no_grad():
                features = torch.cat([self.features(p) for p in bank.pixels.split(256)])

        progress = Progress(CURRICULUM.index(args.start_images), args.advance)
        optimizer = Optimizer(modules, args.lr, args.minutes, floor=0.03)
        last_save = time.time()
        while optimizer.elapsed_s < optimizer.budget_s:
            batch = batches.next(progress.max_images)
            which = batch.images
            visual = self.projector(self.features(bank.pixels[which]) if joint else features[which])
            at_answer, at_end = answer_logits(self.model, batch, visual, encoder.image)
            loss = F.cross_entropy(at_answer.flatten(0, 1), batch.answers.flatten())
            ends = torch.full_like(batch.answers, encoder.end).flatten()
            total = loss + 0.1 * F.cross_entropy(at_end.flatten(0, 1), ends)
            if joint:
                aligned, digit_hit, colour_hit = alignment(visual, bank.digits[which], bank.colours[which])
                total = total + aligned
                progress.count(aligned_digit=digit_hit, aligned_colour=colour_hit)
            lr = optimizer.lr
            optimizer.step(total)
            progress.update(batch, at_answer, loss.item())
            if optimizer.steps % 25 == 0:
                place = {"stage": args.stage, "step": optimizer.steps, "t": optimizer.elapsed_s}
                self.log(**place, lr=lr, **progress.report())
            if time.time() - last_save > SAVE_INTERVAL_S:
                self.save()
                last_save = time.time()
        self.save()
        self.finish(optimizer, alignment)


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
            self.count(**{task: hit})
        if batch.num_images == self.max_images:
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


def answer_logits(
    model: InternVLForConditionalGeneration, batch: Batch, visual_tokens: torch.Tensor, image_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict each answer and each end of turn: two tensors [B, K, vocabulary].

    Runs the language model's own layers with V2PE positions; rows have no padding, so no mask is needed.
    """
    lm = model.model.language_model
    ids = batch.input_ids
    is_visual = ids == image_token
    hidden = lm.embed_tokens(ids).masked_scatter(is_visual[..., None], visual_tokens)
    rotary = lm.rotary_emb(hidden, v2pe_positions(is_visual, batch.delta))
    for layer in lm.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    rows = torch.arange(len(ids))[:, None]
    at_answer, at_end = (model.lm_head(lm.norm(hidden[rows, batch.prompts + k])) for k in (0, 1))
    return at_answer, at_end


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vision", "lm", "joint"])
    parser.add_argument("--out", type=Path, default=Path("checkpoint"), help="folder of the checkpoint")
    parser.add_argument("--log", type=Path, default=Path("log.jsonl"))
    parser.add_argument("--minutes", type=float, required=True, help="time budget of this stage")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bank", type=int, default=300, help="pictures per (digit, colour)")
    parser.add_argument("--batch-tokens", type=int, default=8000)
    parser.add_argument("--start-images", type=int, default=1, choices=CURRICULUM)
    parser.add_argument("--advance", type=float, default=0.8, help="accuracy at which contexts grow")
    parser.add_argument("--resume", action="store_true", help="go on with this stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    """Run one stage."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.stage == "vision" and not args.resume:
        processor = build.build_processor()
        model = build.build_model(processor.tokenizer).train()
    else:
        processor = AutoProcessor.from_pretrained(args.out)
        model = AutoModelForImageTextToText.from_pretrained(args.out, dtype=torch.float32).train()
    trainer = Trainer(args, model, processor)
    if args.stage == "vision":
        trainer.train_vision()
    else:
        trainer.train_answers()


if __name__ == "__main__":
    main()
