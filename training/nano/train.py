"""Train the nano model on CPU: `python -m training.nano.train {vision,lm,joint,frames} --minutes M`.

Stages (each one starts from what the one before saved in --out):

  vision  classify digit and colour from the mean of the projected visual tokens
  lm      freeze the vision tower, cache its features for a bank of pictures and train projector + language
          model on the question answering task; the number of images per context grows along a curriculum
  joint   unfreeze everything; the curriculum goes on; an auxiliary loss keeps the visual tokens aligned with
          the embeddings of the words for their digit and colour
  frames  widen the window of positions, let `<img>` tell whose a picture is (`owners.py`), then train the language
          model alone, on contexts with unlabelled pictures too, many of them condensed (`batches.py`)

From `lm` on every batch holds sequences of the same shape: one context, then several question/answer
turns; the loss is on the answers (and the end-of-turn token). Every sequence draws its own V2PE increment
`delta`: text tokens advance the RoPE position by 1, visual tokens by delta; delta=1 is the ordinary position.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from mminfer.nano import data
from training.nano import build
from training.nano.batches import Batch, Batches, Encoder
from training.nano.loop import CURRICULUM, Log, Optimizer, Progress
from training.nano.owners import insert_owner_layer
from training.nano.retrieval import init_language_model
from training.nano.vision import (
    Alignment,
    Classifier,
    Probe,
    normalise,
    random_pictures,
    reading_accuracy,
    vision_features,
)

SAVE_INTERVAL_S = 120


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

    @torch.no_grad()
    def cached_features(self, bank: data.ImageBank) -> torch.Tensor:
        """What the vision tower, as it is, makes of all pictures of the bank [pictures, 64, 96]."""
        return torch.cat([self.features(pixels) for pixels in bank.pixels.split(256)])

    @torch.no_grad()
    def extend_language_model(self, features: torch.Tensor, batches: Batches) -> None:
        """From what the joint stage left to the start of the frames stage: a wider window, pictures without a label."""
        lm = self.inner.language_model
        lm.config.rope_parameters, lm.config.max_position_embeddings = dict(build.ROPE), build.WINDOW
        lm.rotary_emb = type(lm.rotary_emb)(lm.config)
        insert_owner_layer(self.model, self.processor.tokenizer, self.projector(features), batches)

    def train_answers(self) -> None:
        """Stages "lm" and "frames" (vision tower frozen, features cached) and "joint" (everything trained)."""
        args, joint, frames = self.args, self.args.stage == "joint", self.args.stage == "frames"
        if args.stage == "lm" and not args.resume:
            self.prepare_language_model()
        encoder = Encoder(self.processor.tokenizer)
        bank = data.ImageBank(args.bank, "train", seed=args.seed)
        batches = Batches(encoder, bank, random.Random(args.seed), args.batch_tokens)
        alignment = Alignment(self.model, self.processor.tokenizer)
        modules = [self.inner.language_model, *([] if frames else [self.projector])]
        modules += [self.inner.vision_tower, alignment] if joint else []
        cached = None if joint else self.cached_features(bank)
        if cached is not None and frames and not args.resume:
            self.extend_language_model(cached, batches)
        rng = random.Random(args.seed + 1)
        progress = Progress(CURRICULUM.index(args.start_images), args.advance)
        optimizer = Optimizer(modules, args.lr, args.minutes, floor=0.03)
        last_save = time.time()
        while optimizer.elapsed_s < optimizer.budget_s:
            long = frames and rng.random() < args.frames_share
            batch = batches.next_frames(args.frames_pictures) if long else batches.next(progress.max_images)
            which = batch.pictures
            visual = self.projector(self.features(bank.pixels[which]) if cached is None else cached[which])
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
        if not frames:
            self.finish(optimizer, alignment)


def answer_logits(
    model: InternVLForConditionalGeneration, batch: Batch, visual_tokens: torch.Tensor, image_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict each answer and each end of turn: two tensors [B, K, vocabulary].

    Runs the language model's own layers with the batch's positions; rows have no padding.
    """
    lm = model.model.language_model
    ids = batch.input_ids
    is_visual = ids == image_token
    hidden = lm.embed_tokens(ids).masked_scatter(is_visual[..., None], visual_tokens)
    rotary = lm.rotary_emb(hidden, batch.positions)
    for layer in lm.layers:
        hidden = layer(hidden, attention_mask=batch.bias, position_embeddings=rotary)
    rows = torch.arange(len(ids))[:, None]
    at_answer, at_end = (model.lm_head(lm.norm(hidden[rows, batch.prompts + k])) for k in (0, 1))
    return at_answer, at_end


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vision", "lm", "joint", "frames"])
    parser.add_argument("--out", type=Path, default=Path("checkpoint"), help="folder of the checkpoint")
    parser.add_argument("--log", type=Path, default=Path("log.jsonl"))
    parser.add_argument("--minutes", type=float, required=True, help="time budget of this stage")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bank", type=int, default=300, help="pictures per (digit, colour)")
    parser.add_argument("--batch-tokens", type=int, default=8000)
    parser.add_argument("--start-images", type=int, default=1, choices=CURRICULUM)
    parser.add_argument("--advance", type=float, default=0.8, help="accuracy at which contexts grow")
    parser.add_argument("--frames-share", type=float, default=0.6, help="share of batches with frames")
    parser.add_argument("--frames-pictures", type=int, default=32, help="pictures in a batch with frames, at most")
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
