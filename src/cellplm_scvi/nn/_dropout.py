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
    """Keeps a mask of bytes, a quarter of what one of numbers would take, from one pass to the other."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: int) -> Tensor:
        n = x.numel()
        draws = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), None)
        # bytes become 0 or 1 as bytes: a comparison is slower here
        keep = draws.view(torch.uint8)[:n].view(x.shape).clamp_(threshold - 1, threshold).sub_(threshold - 1)
        ctx.save_for_backward(keep)
        ctx.scale = 256 / (256 - threshold)
        return _kept(x, keep, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _kept(grad, keep, ctx.scale), None


def _kept(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """``x`` where ``keep`` is 1, times ``scale``, and 0 where it is 0."""
    result = keep.to(x.dtype)
    return torch.addcmul(result.new_zeros(()), result, x, value=scale, out=result)


class Dropout(nn.Dropout):
    """:func:`dropout` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)
