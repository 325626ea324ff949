"""V2PE: visual tokens advance the rotary position by less than a text token does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from mminfer.errors import ConfigError, shown
from mminfer.layout import TokenLayout
from mminfer.technique import PositionTechnique, is_number, is_whole

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

DELTAS = tuple(2.0**-k for k in range(9))  # 1, 1/2, ..., 1/256: what training drew from
ROUNDING = 1e-9  # 70 * 0.1 is 7.000000000000001: a step that is no power of two must not cost text a position


@dataclass(frozen=True)
class V2PE(PositionTechnique):
    """Variable visual position encoding: the rotary step of a visual token.

    Args:
        delta: in (0, 1]; training drew it from {1, 1/2, ..., 1/256}. 1 is the model's own positions. "auto" takes for
            each sequence the largest of these that keeps it inside the window, or the smallest if none does.
        window: positions that "auto" may use; None: as many as the model was made for.

    Raises:
        ConfigError: `delta` or `window` is out of range.

    Warns:
        UntrainedWarning: a step below 1, or "auto", on a model whose configuration names no `rope_pos_id_version` that
            begins with "v2pe"; once, where the model is patched or its engine made.

    Reference:
        V2PE (arXiv 2412.09616) section 3; scaling every axis of M-RoPE models is ours, and so is "auto".
    """

    delta: float | str = 1 / 16
    window: int | None = None

    def __post_init__(self) -> None:
        if self.delta != "auto":
            _check_delta(self.delta)
        if self.window is not None and not is_whole(self.window, least=1):
            raise ConfigError(
                f"V2PE.window={shown(self.window)}, wanted 1 or more positions, or None for the model's own"
            )

    def check(self, spec: ModelSpec) -> None:
        """Any rotary model will do."""

    def doubt(self, spec: ModelSpec) -> str | None:
        """A step below 1 on a model whose configuration does not say that it was trained with such steps."""
        if not self.fractional or spec.variable_positions:
            return None
        return (
            f"V2PE(delta={self.delta!r}): nothing in the configuration of this {spec.family} model says that it was "
            "trained with steps below 1 (rope_pos_id_version, as V2PE's authors write it), and they ruin the answers "
            "of a model that was not; delta=1 leaves positions as they are"
        )

    @property
    def needs_whole_prompt(self) -> str | None:
        return 'V2PE.delta="auto": give a number, such as 1/256' if self.delta == "auto" else None

    @property
    def fractional(self) -> bool:
        return self.delta != 1

    def apply(self, layout: TokenLayout, max_positions: int) -> TokenLayout:
        if not self.fractional:
            return layout
        parts = [self._sequence(layout, start, stop, self.window or max_positions) for start, stop in layout.spans]
        last = torch.stack([part.amax() for part in parts])
        return layout.at(torch.cat(parts, 1), _ceil(last) + 1)

    def _sequence(self, layout: TokenLayout, start: int, stop: int, window: int) -> torch.Tensor:
        """[A, N] positions of one sequence."""
        place = _line if layout.position.shape[0] == 1 else _grid
        if isinstance(self.delta, (int, float)):
            return place(layout, start, stop, self.delta)
        for delta in DELTAS:
            position = place(layout, start, stop, delta)
            if float(position.amax()) < window:
                break
        return position

    def describe(self) -> str:
        step = "the largest step that fits the window" if isinstance(self.delta, str) else f"{self.delta:g}"
        return f"A visual token advances the rotary position by less than a text token does: {step}."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {f"v2pe-{n}": cls(delta=1 / n) for n in (4, 16, 64, 256)} | {"v2pe-auto": cls(delta="auto")}


def _line(layout: TokenLayout, start: int, stop: int, delta: float) -> torch.Tensor:
    first, visual = layout.position[:, start], layout.is_visual[None, start:stop]
    sequence = layout.sequence[start]
    last = first.new_tensor(torch.nan) if layout.run_before is None else layout.run_before[sequence]
    if layout.run_before is None and not bool(first > 0):
        return first + v2pe_positions(visual, delta)
    # A later stretch: text (or a whole number in place of it) stands before whatever comes first.
    before = torch.cat([visual.new_zeros(1, 1), visual], 1)
    position = first - 1 + v2pe_positions(before, delta)[:, 1:]
    if not bool(visual[0, 0]) or bool(last.isnan()):
        return position
    # A run that goes on: the text behind it restarts at a whole number all the same.
    lead = int(visual[0].long().cumprod(0).sum())
    run = last + delta * torch.arange(1, lead + 1, dtype=position.dtype, device=position.device)
    saved = _ceil(position[:, lead - 1]) - _ceil(run[-1])
    return torch.cat([run[None], position[:, lead:] - saved], 1)


def _grid(layout: TokenLayout, start: int, stop: int, delta: float) -> torch.Tensor:
    rows = slice(start, stop)
    return v2pe_mrope_positions(layout.position[:, rows], layout.is_visual[rows], layout.image_id[rows], delta)


def v2pe_positions(visual_mask: torch.Tensor, delta: float, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Positions on one axis: a text token advances by 1, a visual token by `delta`.

    A visual run after text at integer position p gets `p + delta, p + 2 * delta, ...`; the next text token
    gets `ceil(last) + 1`. A prompt that starts with a visual run starts at 0 like any other: `0, delta, 2 *
    delta, ...`.

    Args:
        visual_mask: [B, N] bool, true at visual tokens.
        delta: step of a visual token, in (0, 1]; 1 gives 0, 1, 2, ... bit for bit.
        attention_mask: [B, N], 0 at padding on either side; None means no padding.

    Returns:
        [B, N] float64, 0 at padding. Decoding goes on at the last position + 1.

    Raises:
        ConfigError: `delta` is out of range.
        ValueError: shapes that do not fit.

    Reference:
        V2PE (arXiv 2412.09616), its position rule. The authors' code takes one sequence and 256 tokens an
        image; this takes any batch and any run, and float64 because float32 cannot hold `delta = 1/256`
        beyond position 65,536.
    """
    _check_delta(delta)
    if visual_mask.dim() != 2 or (attention_mask is not None and attention_mask.shape != visual_mask.shape):
        mask = None if attention_mask is None else list(attention_mask.shape)
        raise ValueError(f"visual_mask is {list(visual_mask.shape)}, attention_mask {mask}, wanted [B, N] both")
    valid = torch.ones_like(visual_mask) if attention_mask is None else attention_mask.bool()
    visual = visual_mask & valid
    texts = (valid & ~visual).cumsum(1)  # text tokens so far
    step = _place_in_run(visual).double()  # 1, 2, ... in each visual run; float32 would cost a step of 0.3 its digits
    leading = visual & (texts == 0)
    # A run moves the text behind it on by a whole number; a leading one has no text before it to count from.
    advance = torch.where(leading, _ceil((step - 1) * delta) + 1, _ceil(step * delta))
    advance = advance.masked_fill(~_run_end(visual), 0)
    before = texts - 1 + advance.cumsum(1) - advance
    position = torch.where(visual, before + step * delta, texts - 1 + advance.cumsum(1))
    return (position + leading.double() * (1 - delta)).masked_fill(~valid, 0)


def v2pe_mrope_positions(
    positions: torch.Tensor, visual_mask: torch.Tensor, image_id: torch.Tensor, delta: float
) -> torch.Tensor:
    """Positions on several axes: the host's, with the extent of every image scaled by `delta`.

    An image stays where the text before it left off; on every axis its tokens' offsets from there (from the
    smallest position over its tokens and axes) are multiplied by `delta`. How far the host itself goes on
    after an image, A, is read from where its next token or image starts: its larger side for an image, and
    for a video too, whatever its number of frames. What follows goes on at `ceil(delta * (A - 1)) + 1`, so
    `delta = 1` is the host's bit for bit. Frames that start together (one video, an id a frame) stay
    together.

    Args:
        positions: [A, N] the host's positions of one sequence without padding, integers in float64.
        visual_mask: [N] bool, true at visual tokens.
        image_id: [N] int64, the image or frame of each visual token, -1 at text.
        delta: scale of visual offsets, in (0, 1].

    Returns:
        [A, N] float64.

    Raises:
        ConfigError: `delta` is out of range.
        ValueError: shapes that do not fit.

    Reference:
        Ours; V2PE (arXiv 2412.09616) has one axis.
    """
    _check_delta(delta)
    if positions.dim() != 2 or visual_mask.shape != positions.shape[1:] or image_id.shape != positions.shape[1:]:
        shapes = [list(x.shape) for x in (positions, visual_mask, image_id)]
        raise ValueError(f"positions, visual_mask, image_id are {shapes}, wanted [A, N], [N], [N]")
    if positions.shape[1] == 0:
        return positions.double()
    positions = positions.double()
    owner = torch.where(visual_mask, image_id, -1)
    runs, run = torch.unique_consecutive(owner, return_inverse=True)
    start = torch.full_like(runs, torch.inf, dtype=torch.float64)
    start.scatter_reduce_(0, run, positions.amin(0), "amin")
    extent = (start.diff(append=start[-1:]) - 1).clamp_(min=0)  # A - 1; nothing follows the last run
    saved = torch.where(runs >= 0, extent - _ceil(extent * delta), 0)
    shift = (saved.cumsum(0) - saved)[run]
    scale = torch.where(visual_mask, positions.new_tensor(delta), 1.0)
    return (start[run] - shift) + scale * (positions - start[run])


def _place_in_run(visual: torch.Tensor) -> torch.Tensor:
    """1, 2, ... within each run of true values; [B, N] int64."""
    count = visual.cumsum(1)
    return count - count.masked_fill(visual, 0).cummax(1).values


def _run_end(visual: torch.Tensor) -> torch.Tensor:
    """True at the last token of each run of true values."""
    end = visual.clone()
    end[:, :-1] &= ~visual[:, 1:]
    return end


def _ceil(x: torch.Tensor) -> torch.Tensor:
    return torch.ceil(x.double() - ROUNDING)


def _check_delta(delta: object) -> None:
    if not is_number(delta, above=0) or delta > 1:  # type: ignore[operator]
        raise ConfigError(
            f"delta is {shown(delta)}, wanted a step in (0, 1], such as 1/16; 1 leaves positions as they are"
        )
