"""Synthetic long multimodal needle-in-a-haystack data for the nano model.

A *context* is a list of interleaved items, each one either

  * an image item:  text "Image <ID>:" followed by a 32x32 picture that shows one
    real handwritten digit (scikit-learn's UCI digits) in one of six colours,
  * a frame:        such a picture without a label, as in a film; no question is about it, or
  * a text fact:    "The code of <word> is <number>."

and a question about the context is one of three kinds:

  Q1 "Which image shows a red 7?"  -> "<ID>" of the only such image, or "none"
  Q2 "What digit is in image <ID>?" -> "7"   /  "What colour is in image <ID>?" -> "red"
  Q3 "What is the code of <word>?"  -> "47"

Everything is a pure function of the seed. Digits are split by sample into "train" and "test", so test
pictures show handwriting never seen in training. IDs come from a pool of 400 that does not depend on the
number of images.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from mminfer.errors import ConfigError
from mminfer.nano.pictures import COLOUR_NAMES, DIGIT_NAMES, IMAGE_SIZE, ImageBank, load_digit_split, render

__all__ = [
    "CODES",
    "COLOUR_NAMES",
    "DIGIT_NAMES",
    "IDS",
    "IMAGE_SIZE",
    "NONE",
    "WORDS",
    "Context",
    "FactItem",
    "FrameItem",
    "ImageBank",
    "ImageItem",
    "Question",
    "default_num_facts",
    "draw_images",
    "load_digit_split",
    "render",
    "sample_context",
    "to_content",
    "to_messages",
]

NONE = "none"

# Image labels: two capital consonants, each label is a single token.
_ID_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
IDS = [a + b for a in _ID_LETTERS for b in _ID_LETTERS]

# Text facts: 64 words x codes 10..99, each a single token.
WORDS = (  # noqa: SIM905
    "apple bear boat bread brick cake camel candle cat chair cloud coin corn crab crown desk "
    "dog door dove drum eagle engine fish flag flute fork fox garden ghost glass goat gold "
    "hat horse house ice island jar key kite lamp leaf lemon lion maple moon mouse nest "
    "oak owl pearl piano plum pond queen ring river rose ship snow stone tiger tower wolf"
).split()
CODES = [str(n) for n in range(10, 100)]


@dataclass
class ImageItem:
    """One labelled picture of a context."""

    label: str  # the ID, e.g. "QX"
    digit: int
    colour: int  # index into COLOUR_NAMES

    @property
    def combo(self) -> int:
        """Digit and colour as one number in 0..59."""
        return self.digit * 6 + self.colour

    @property
    def colour_name(self) -> str:
        """The colour as a word."""
        return COLOUR_NAMES[self.colour]

    @property
    def text(self) -> str:
        """What stands before the picture."""
        return f"Image {self.label}:"


@dataclass
class FrameItem:
    """One picture without a label; in training it may stand for many equal ones in a row."""

    digit: int
    colour: int  # index into COLOUR_NAMES
    copies: int = 1

    @property
    def combo(self) -> int:
        """Digit and colour as one number in 0..59."""
        return self.digit * 6 + self.colour

    @property
    def text(self) -> str:
        """Nothing stands before the picture."""
        return ""


@dataclass
class FactItem:
    """One text fact of a context."""

    word: str
    code: str

    @property
    def text(self) -> str:
        """The fact as a sentence."""
        return f"The code of {self.word} is {self.code}."


Item = ImageItem | FrameItem | FactItem


@dataclass
class Question:
    """A question about a context and its only right answer."""

    task: str  # "q1", "q1_none", "q2_digit", "q2_colour" or "q3"
    text: str
    answer: str
    depth: float | None = None  # relative position of the needle in the context, 0..1


@dataclass
class Context:
    """Interleaved items and questions about them."""

    items: list[Item]
    questions: list[Question] = field(default_factory=list)

    @property
    def images(self) -> list[ImageItem]:
        """The image items, in order."""
        return [i for i in self.items if isinstance(i, ImageItem)]

    @property
    def frames(self) -> list[FrameItem]:
        """The frames, in order."""
        return [i for i in self.items if isinstance(i, FrameItem)]

    @property
    def pictures(self) -> list[ImageItem | FrameItem]:
        """Everything that shows a picture, in order."""
        return [i for i in self.items if not isinstance(i, FactItem)]

    @property
    def facts(self) -> list[FactItem]:
        """The text facts, in order."""
        return [i for i in self.items if isinstance(i, FactItem)]


def default_num_facts(num_images: int) -> int:
    """Facts in a context of that many images: a quarter, at least 2, at most 16."""
    return min(max(2, num_images // 4), 16)


def sample_context(
    rng: random.Random,
    num_images: int,
    num_facts: int | None = None,
    tasks: list[str] | None = None,
    num_frames: int = 0,
    num_runs: int | None = None,
    decoys: bool = False,
) -> Context:
    """A random context and one question per entry of `tasks`.

    A (colour, digit) combination asked about by Q1 occurs exactly once in the context, for "q1_none" nowhere;
    no frame shows one, unless there are decoys.

    Args:
        rng: the only source of randomness.
        num_images: labelled pictures, at most 400, the number of labels.
        num_facts: at most 64, the number of words; by default `default_num_facts`.
        tasks: "q1", "q1_none", "q2", "q2_digit", "q2_colour" or "q3"; by default a balanced list of 12.
        num_frames: pictures without a label.
        num_runs: gaps between the other items that frames may go to; by default all of them.
        decoys: let frames show what Q1 asks for, so that the label decides: for training only.

    Raises:
        ConfigError: more images or facts than there are names for, or an unknown task.
    """
    if num_facts is None:
        num_facts = default_num_facts(num_images)
    if tasks is None:
        tasks = ["q1"] * 3 + ["q1_none"] + ["q2"] * 4 + ["q3"] * 4
    least_facts = 1 if "q3" in tasks else 0
    if not 1 <= num_images <= len(IDS) or not least_facts <= num_facts <= len(WORDS):
        raise ConfigError(
            f"{num_images} images and {num_facts} facts: wanted 1 to {len(IDS)} images and "
            f"{least_facts} to {len(WORDS)} facts"
        )
    chosen, unique, absent, filler = _choose_combos(rng, num_images, tasks)
    labels = rng.sample(IDS, num_images)
    images = [ImageItem(label, c // 6, c % 6) for label, c in zip(labels, chosen, strict=True)]
    facts = [FactItem(w, rng.choice(CODES)) for w in rng.sample(WORDS, num_facts)]

    # Facts go to random gaps; the images' order is already random.
    order = [True] * num_images + [False] * num_facts
    rng.shuffle(order)
    image_iter, fact_iter = iter(images), iter(facts)
    context = Context([next(image_iter) if is_image else next(fact_iter) for is_image in order])
    if num_frames:
        filler += (unique + absent) * 3 if decoys else []
        _add_frames(rng, context, [rng.choice(filler) for _ in range(num_frames)], num_runs)
    context.questions = _ask(rng, context, images, facts, tasks, unique, absent)
    return context


def _add_frames(rng: random.Random, context: Context, combos: list[int], num_runs: int | None) -> None:
    """Frames that show these combos go to random gaps between the items."""
    gaps = len(context.items) + 1
    runs: list[list[Item]] = [[] for _ in range(gaps)]
    chosen = rng.sample(range(gaps), min(num_runs or gaps, gaps))
    for combo in combos:
        runs[rng.choice(chosen)].append(FrameItem(combo // 6, combo % 6))
    pairs = zip(runs, [*([item] for item in context.items), []], strict=True)
    context.items = [item for run, after in pairs for item in [*run, *after]]


def _choose_combos(
    rng: random.Random, num_images: int, tasks: list[str]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Combos to show in random order, those among them that occur once, some that do not occur, all others."""
    combos = rng.sample(range(60), 60)
    num_unique = min(tasks.count("q1"), num_images)
    unique = combos[:num_unique]
    absent = combos[num_unique : num_unique + min(tasks.count("q1_none"), 20)]
    filler = combos[num_unique + len(absent) :]
    if absent and rng.random() < 0.5:
        # Hard negatives: let fillers share the colour or the digit of an absent combo.
        digits, colours = {a // 6 for a in absent}, {a % 6 for a in absent}
        filler += [c for c in filler if c // 6 in digits or c % 6 in colours]
    chosen = unique + [rng.choice(filler) for _ in range(num_images - num_unique)]
    rng.shuffle(chosen)
    return chosen, unique, absent, filler


def _ask(
    rng: random.Random,
    context: Context,
    images: list[ImageItem],
    facts: list[FactItem],
    tasks: list[str],
    unique: list[int],
    absent: list[int],
) -> list[Question]:
    """One question per task; as far as possible each about another item."""
    last = max(1, len(context.items) - 1)
    depth = {id(item): i / last for i, item in enumerate(context.items)}
    by_combo = {item.combo: item for item in images}
    q1_pool = itertools.cycle(unique)
    q2_pool = rng.sample(images, len(images))
    q2_pool.sort(key=lambda item: item.combo in unique)  # not Q1's needles, if possible
    q3_pool = rng.sample(facts, len(facts))
    questions = []
    for n, task in enumerate(tasks):
        if task == "q1":
            image = by_combo[next(q1_pool)]
            questions.append(Question("q1", _which_image(image.combo), image.label, depth[id(image)]))
        elif task == "q1_none":
            questions.append(Question("q1_none", _which_image(absent[n % len(absent)]), NONE))
        elif task in ("q2", "q2_digit", "q2_colour"):
            image = q2_pool[n % len(q2_pool)]
            kind = task if task != "q2" else rng.choice(["q2_digit", "q2_colour"])
            text = f"What {kind.removeprefix('q2_')} is in image {image.label}?"
            answer = str(image.digit) if kind == "q2_digit" else image.colour_name
            questions.append(Question(kind, text, answer, depth[id(image)]))
        elif task == "q3":
            fact = q3_pool[n % len(q3_pool)]
            questions.append(Question("q3", f"What is the code of {fact.word}?", fact.code, depth[id(fact)]))
        else:
            raise ConfigError(f"task {task!r}: wanted 'q1', 'q1_none', 'q2', 'q2_digit', 'q2_colour' or 'q3'")
    return questions


def _which_image(combo: int) -> str:
    return f"Which image shows a {COLOUR_NAMES[combo % 6]} {combo // 6}?"


def draw_images(context: Context, split: str, seed: int) -> torch.Tensor:
    """Pictures of a context's images and frames, uint8 [N, 32, 32, 3], in context order."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor([i.digit for i in context.pictures])
    colours = torch.tensor([i.colour for i in context.pictures])
    return render(digits, colours, split, generator)


def to_content(context: Context, pictures: torch.Tensor) -> list[dict[str, Any]]:
    """The context as the content list of one Hugging Face chat message (without a question)."""
    remaining = iter(pictures)
    content: list[dict[str, Any]] = []
    for item in context.items:
        if item.text:
            content.append({"type": "text", "text": item.text})
        if not isinstance(item, FactItem):
            content.append({"type": "image", "image": Image.fromarray(next(remaining).numpy())})
    return content


def to_messages(context: Context, pictures: torch.Tensor, question: Question) -> list[dict[str, Any]]:
    """A one-question chat, ready for `processor.apply_chat_template`."""
    content = [*to_content(context, pictures), {"type": "text", "text": question.text}]
    return [{"role": "user", "content": content}]
