"""Dropout that does not wait for random numbers on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Zero a random share ``rate`` of the entries and scale the others up to the same expectation.

    On a CPU each entry takes one random byte, eight of them a draw, where torch draws a Bernoulli variate an entry, which
    is a tenth of a training step. The rate is rounded to a 256th there, and the scale is that of the rounded rate.
    """
    if not training or rate <= 0.0:
        return x
    threshold = round(256 * rate)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not 0 < threshold < 256:
        return F.dropout(x, rate)
    return _ByteDropout.apply(x, threshold)


class _ByteDropout(torch.autograd.Function):
    """Keeps the bytes, a quarter of what the mask would take, from one pass to the other."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: int) -> Tensor:
        n = x.numel()
        draws = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), None)
        random_bytes = draws.view(torch.uint8)[:n].view(x.shape)
        ctx.save_for_backward(random_bytes)
        ctx.threshold = threshold
        return _kept(x, random_bytes, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (random_bytes,) = ctx.saved_tensors
        return _kept(grad, random_bytes, ctx.threshold), None


def _kept(x: Tensor, random_bytes: Tensor, threshold: int) -> Tensor:
    """``x`` where bytes reach the threshold, scaled to the same expectation, else 0."""
    # bytes become 0 or 1 as bytes: a comparison is slower here
    keep = random_bytes.clamp(threshold - 1, threshold).sub_(threshold - 1).to(x.dtype)
    return torch.addcmul(keep.new_zeros(()), keep, x, value=256 / (256 - threshold), out=keep)


class Dropout(nn.Dropout):
    """:func:`dropout` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)
