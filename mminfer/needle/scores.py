"""From single answers to rows: accuracy with its interval and what it took, by setting, images, depth and metric."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mminfer.needle.protocol import NeedleProtocol, Question, Verdict

Z_95 = 1.959964


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    Args:
        setting: name of the setting.
        images: pictures in the context.
        question: what was asked.
        text: what the model said.
        verdict: what that is worth.
        ms: from the question to the end of the answer; in-prompt, the context is part of the question.
        read_ms: reading the context; None in-prompt. Questions of one context share it.
        cache_bytes: keys and values held after the prompt.
        full_cache_bytes: the same of the uncompressed model.
        peak_bytes: highest memory in use while answering.
    """

    setting: str
    images: int
    question: Question
    text: str
    verdict: Verdict
    ms: float
    read_ms: float | None
    cache_bytes: int
    full_cache_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "setting": self.setting,
            "images": self.images,
            "kind": self.question.kind,
            "depth": self.question.depth,
            "question": self.question.text,
            "expected": self.question.expected,
            "answer": self.text,
            "right": self.verdict.right,
            "parsed": self.verdict.parsed,
        }


@dataclass(frozen=True)
class Row:
    """Answers of one cell.

    Args:
        setting: name of the setting.
        images: pictures in a context.
        depth: of the needle; None: all depths together.
        metric: what was counted.
        samples: answers counted.
        right: right ones among them.
        unparsable: those that could not be read as an answer, counted as wrong.
        accuracy: right / samples.
        low: lower end of the 95 % Wilson interval.
        high: its upper end.
        chance: accuracy of guessing.
        ms: median time of an answer.
        read_ms: median time of reading a context before the questions; None where it is part of the answer.
        cache_bytes: mean size of the cache after the prompt.
        full_cache_bytes: the same of the uncompressed model.
        peak_bytes: highest memory in use while answering.
    """

    setting: str
    images: int
    depth: float | None
    metric: str
    samples: int
    right: int
    unparsable: int
    accuracy: float
    low: float
    high: float
    chance: float
    ms: float
    read_ms: float | None
    cache_bytes: int
    full_cache_bytes: int
    peak_bytes: int


def wilson(right: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score method.

    Args:
        right: how many of the samples.
        samples: 1 or more.
    """
    share, z2 = right / samples, Z_95**2
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z_95 / (1 + z2 / samples) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    return centre - half if right else 0.0, centre + half if right < samples else 1.0


def rows_of(answers: Sequence[Answer], protocol: NeedleProtocol) -> list[Row]:
    """A row for all depths together and one for each, of every metric, number of images and setting."""
    cells: dict[tuple[int, str, str, float | None], list[Answer]] = {}
    for answer in answers:
        for metric in answer.verdict.right:
            for depth in dict.fromkeys((None, answer.question.depth)):
                cells.setdefault((answer.images, answer.setting, metric, depth), []).append(answer)
    chance = {images: protocol.chance(images) for images in {answer.images for answer in answers}}
    order = list(cells)
    places = {name: order.index(next(k for k in order if k[:3] == name)) for name in {k[:3] for k in order}}
    order.sort(key=lambda k: (places[k[:3]], -1.0 if k[3] is None else k[3]))
    return [_row(key, cells[key], chance[key[0]][key[2]]) for key in order]


def _row(key: tuple[int, str, str, float | None], answers: Sequence[Answer], chance: float) -> Row:
    images, setting, metric, depth = key
    right = sum(answer.verdict.right[metric] for answer in answers)
    low, high = wilson(right, len(answers))
    read = [answer.read_ms for answer in answers if answer.read_ms is not None]
    return Row(
        setting=setting,
        images=images,
        depth=depth,
        metric=metric,
        samples=len(answers),
        right=right,
        unparsable=sum(not answer.verdict.parsed for answer in answers),
        accuracy=right / len(answers),
        low=low,
        high=high,
        chance=chance,
        ms=statistics.median(answer.ms for answer in answers),
        read_ms=statistics.median(read) if read else None,
        cache_bytes=round(statistics.mean(answer.cache_bytes for answer in answers)),
        full_cache_bytes=round(statistics.mean(answer.full_cache_bytes for answer in answers)),
        peak_bytes=max(answer.peak_bytes for answer in answers),
    )
