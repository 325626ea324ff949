"""Fitted masses in plain PyTorch: two products a step."""

import torch


@torch.no_grad()
def fit_masses(shares: torch.Tensor, counts: torch.Tensor, ridge: float, iterations: int, most: float) -> torch.Tensor:
    """See `mminfer_kernels.fit_masses`."""
    tiny = torch.finfo(torch.float32).tiny
    held = (shares.square().sum((1, 2)) * ridge / counts.clamp_min(1) + tiny)[:, None, None]
    wanted = shares.sum(2, keepdim=True).add_(held)  # [P, k, 1]
    step = _product(shares, shares.sum(1)[..., None]).add_(held).reciprocal_()
    factor = ahead = torch.ones_like(wanted)
    pace = 1.0
    for _ in range(iterations):
        last, pace_was, pace = factor, pace, (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        gradient = _product(shares, _product(shares.mT, ahead)).addcmul_(ahead, held).sub_(wanted)
        factor = torch.addcmul(ahead, gradient, step, value=-1).clamp_(1 / most, most)
        ahead = factor.lerp(last, (1 - pace_was) / pace)
    return factor[..., 0]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[P, a, b]: left @ right; on a CPU a matrix times a vector takes half the time of a batch of one."""
    return (left[0] @ right[0])[None] if len(left) == 1 else left @ right
