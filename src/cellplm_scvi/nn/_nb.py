r"""Negative binomial likelihood of counts whose mean is a softmax over genes times the library size.

With logits :math:`\ell`, :math:`p = \mathrm{softmax}(\ell)`, :math:`\mu = L p` and dispersion :math:`\theta`,

.. math::
    -\log p(x) = \log\Gamma(\theta) + \log\Gamma(x + 1) - \log\Gamma(x + \theta)
                 + (\theta + x)\log(1 + \mu/\theta) + x(\log\theta - \log\mu) .

At :math:`x = 0` this is :math:`\theta\log(1 + \mu/\theta)`: the gamma functions are needed at the non-zero counts alone.
:func:`softmax_nb_loss` computes loss and gradient together, a few rows at a time, through the decoder's last linear layer
(the idea of fused linear cross-entropy), so that no cells x genes tensor outlives a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._sparse import SparseCounts, segment_sums

#: entries of one chunk: on a CPU, its two buffers stay in the cache; a GPU wants long kernels
CHUNK_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}
#: fewer rows make poor matrix products
MIN_CHUNK_ROWS = 128


@dataclass(frozen=True)
class GeneOutput:
    """What turns hidden states into expected counts.

    Parameters
    ----------
    weight, bias
        Last linear layer, (n_genes, n_hidden) and (n_genes,).
    log_theta
        Log inverse dispersion of each gene, (n_genes,).
    measured
        Genes that each data set measured, (n_panels, n_genes), or ``None`` for all.
    rest
        Whether the library also holds counts of genes that are not among these (one more term of constant logit 0 in
        the softmax).
    """

    weight: Tensor
    bias: Tensor
    log_theta: Tensor
    measured: Tensor | None = None
    rest: bool = False

    def log_shares(self, h: Tensor, panel: Tensor | None) -> Tensor:
        """Log of each gene's expected share of the library, (..., n_genes); -inf where it was not measured."""
        with torch.autocast(h.device.type, enabled=False):
            logits = torch.nn.functional.linear(h.float(), self.weight.float(), self.bias.float())
        if self.measured is not None and panel is not None:
            logits = logits.masked_fill(~self.measured[panel], -torch.inf)
        return logits - log_total(logits, self.rest)


def log_total(logits: Tensor, rest: bool) -> Tensor:
    """Log of the softmax's denominator, (..., 1)."""
    total = torch.logsumexp(logits, -1, keepdim=True)
    return torch.logaddexp(total, torch.zeros_like(total)) if rest else total


def nb_negative_log_likelihood(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Negative log-likelihood of counts ``x`` for mean ``mu`` > 0 and inverse dispersion ``theta``, elementwise."""
    return (
        torch.lgamma(theta)
        + torch.lgamma(x + 1)
        - torch.lgamma(x + theta)
        + (theta + x) * torch.log1p(mu / theta)
        + x * (theta.log() - mu.log())
    )


def nb_expected_log1p(mean: Tensor, theta: Tensor, scale: Tensor) -> Tensor:
    r"""Expectation of log(1 + s X) for negative binomial X, elementwise.

    By Frullani's integral and the Laplace transform of X,

    .. math::
        E[\log(1 + s X)] = \int_0^\infty \left(1 - E[e^{-t s X}]\right) \frac{e^{-t}}{t}\,dt, \qquad
        E[e^{-u X}] = \left(1 + \tfrac{\mu}{\theta} (1 - e^{-u})\right)^{-\theta} .

    With t = exp(v) the integrand is smooth and vanishes at both ends, where the trapezoidal rule converges
    exponentially; the error is below 1e-4.

    Parameters
    ----------
    mean, theta
        Mean and inverse dispersion of X.
    scale
        Factor s > 0.
    """
    ratio, total = mean / theta, torch.zeros(torch.broadcast_shapes(mean.shape, theta.shape, scale.shape)).to(mean)
    low = -10.0 - float(torch.log1p((mean * scale).nan_to_num()).max()) if mean.numel() else 0.0
    nodes = torch.arange(low, 4.0, 0.5, dtype=torch.float64)
    for v in nodes.tolist():
        t = math.exp(v)
        total += torch.expm1(-theta * torch.log1p(ratio * -torch.expm1(-t * scale))) * (-0.5 * math.exp(-t))
    return total


def softmax_nb_loss(
    h: Tensor,
    counts: SparseCounts,
    library: Tensor,
    output: GeneOutput,
    weight: Tensor,
    panel: Tensor | None = None,
    entry_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over cells of the negative log-likelihood of their counts.

    Parameters
    ----------
    h
        Hidden states before the last linear layer, (n_cells, n_hidden).
    counts
        Counts, (n_cells, n_genes).
    library
        Total that the expected counts of a cell add up to, (n_cells,).
    output
        Last layer, dispersions and panels.
    weight
        Weight of each cell in the sum, (n_cells,); it gets no gradient.
    panel
        Row of ``output.measured`` for each cell, (n_cells,).
    entry_weight
        Weight of each stored count within its cell, (n_nonzero,), such as 2 where the encoder did not see it; ``None``
        and every count that is not stored: 1. It gets no gradient.

    Returns
    -------
    The weighted sum, and the negative log-likelihood of each cell, (n_cells,), without a gradient.
    """
    with torch.autocast(h.device.type, enabled=False):
        learned = (h.float(), output.weight.float(), output.bias.float(), output.log_theta.float())
        return _SoftmaxNB.apply(
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned),
            *learned,
            weight.float(),
            library.float(),
            counts,
            output.measured if panel is not None else None,
            panel,
            output.rest,
            None if entry_weight is None else entry_weight.float(),
        )


class _SoftmaxNB(torch.autograd.Function):
    """Loss and gradient by chunks of rows.

    With r = mu / theta and u = r / (1 + r), the likelihood of a zero is theta log(1 + r) and its slope in log mu theta u.
    r comes out of the last layer with log theta taken off its bias.
    """

    @staticmethod
    def forward(
        ctx,
        needs_grad: bool,
        h: Tensor,
        w: Tensor,
        b: Tensor,
        log_theta: Tensor,
        weight: Tensor,
        library: Tensor,
        counts: SparseCounts,
        measured: Tensor | None,
        panel: Tensor | None,
        rest: bool,
        entry_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        theta = log_theta.exp()
        library = library.clamp_min(1e-8)
        loss = torch.empty_like(library)
        grad_h, grad_w = torch.empty_like(h), torch.zeros_like(w)
        grad_b, grad_theta = torch.zeros_like(b), torch.zeros_like(b)
        shifted, weighted_h = b - log_theta, h * weight[:, None]
        chunks = _chunks(counts)
        # two buffers for all chunks: memory that is in the cache already
        longest = max((rows.stop - rows.start for rows, _ in chunks), default=0)
        buffers = h.new_empty(2, longest, counts.n_genes)
        for rows, span in chunks:
            r, u = buffers[:, : rows.stop - rows.start]
            torch.addmm(shifted, h[rows], w.T, out=r)
            if measured is not None and panel is not None:
                r.masked_fill_(~measured[panel[rows]], -torch.inf)
            top = r.amax(1, keepdim=True)
            if rest:
                top.clamp_min_(0.0)
            r.sub_(top)
            cells, genes = counts.rows[span] - rows.start, counts.genes[span]
            at = cells * counts.n_genes + genes
            log_r = r.view(-1).index_select(0, at)
            total = r.exp_() @ theta
            if rest:
                total += torch.exp(-top[:, 0])
            scale = library[rows] / total
            log_r += scale.log().index_select(0, cells)
            r *= scale[:, None]
            log_ratio = torch.log1p(r, out=u)
            stored = _Stored.of(
                counts.values[span],
                theta.index_select(0, genes),
                log_r,
                None if entry_weight is None else entry_weight[span],
                needs_grad=needs_grad,
            )
            cell_offsets = counts.offsets[rows.start : rows.stop + 1] - span.start
            torch.add(log_ratio @ theta, segment_sums(stored.loss, cell_offsets), out=loss[rows])
            if stored.grad_theta is None:  # no gradient is asked for
                continue
            grad_theta += weight[rows] @ log_ratio
            torch.div(r, torch.add(r, 1, out=u), out=u)
            grad_theta -= weight[rows] @ u
            grad_theta.index_add_(0, genes, stored.grad_theta * weight[rows].index_select(0, cells))
            slope_sum = (u @ theta).add_(segment_sums(stored.slope, cell_offsets))
            # slope - p sum(slope): p is theta r over the library
            u.addcmul_(r, (slope_sum / library[rows])[:, None], value=-1).mul_(theta)
            u.view(-1).scatter_add_(0, at, stored.slope)
            torch.mm(u, w, out=grad_h[rows])
            grad_w.addmm_(u.T, weighted_h[rows])
            grad_b += weight[rows] @ u
        grads = [grad_h.mul_(weight[:, None]), grad_w, grad_b, grad_theta.mul_(theta)]
        if needs_grad:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(loss)
        return weight @ loss, loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor, _grad_loss: Tensor | None):
        return None, *(grad_sum * g for g in ctx.saved_tensors), *[None] * 7


def _chunks(counts: SparseCounts) -> list[tuple[slice, slice]]:
    """Rows of each chunk, and their stored counts."""
    n_cells, device = counts.n_cells, counts.values.device
    entries = CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES["cuda"])
    size = max(MIN_CHUNK_ROWS, entries // max(counts.n_genes, 1))
    if n_cells <= size:  # without a transfer to the host, for which a GPU would have to wait
        return [(slice(0, n_cells), slice(0, counts.values.shape[0]))]
    starts = [*range(0, n_cells, size), n_cells]
    bounds = counts.offsets[torch.tensor(starts, device=device)].tolist()
    return [
        (slice(start, stop), slice(first, last))
        for start, stop, first, last in zip(starts, starts[1:], bounds, bounds[1:], strict=False)
    ]


def gamma_differences(x: Tensor, theta: Tensor, *, slope: bool = True) -> tuple[Tensor, Tensor | None]:
    r""":math:`\log\Gamma(\theta + x) - \log\Gamma(\theta)` and its derivative in theta, elementwise.

    Both are differences of the terms of Stirling's series, after four steps of the recurrence of the gamma function. The
    gamma functions themselves are so large, for large theta, that nothing is left of a difference of them in float32.

    Parameters
    ----------
    x
        Counts, not negative.
    theta
        Inverse dispersions, positive.
    slope
        Whether the derivative is asked for.
    """
    above, first = theta + x, theta + 4
    last = first + x
    log_ratio = torch.log1p(x / first)
    inverse, inverse_first = 1 / last, 1 / first
    square, square_first = inverse * inverse, inverse_first * inverse_first
    value = (last - 0.5) * log_ratio - x + x * first.log()
    value += inverse * (1 / 12 - square * (1 / 360 - square / 1260))
    value -= inverse_first * (1 / 12 - square_first * (1 / 360 - square_first / 1260))
    derivative = log_ratio
    if slope:
        derivative += x / above / theta
        derivative += 0.5 * (inverse_first - inverse)
        derivative += square_first * (1 / 12 - square_first * (1 / 120 - square_first / 252))
        derivative -= square * (1 / 12 - square * (1 / 120 - square / 252))
    product = above  # of what the steps of the recurrence multiply
    for step in range(1, 4):
        ratio = x / (theta + step)
        if slope:
            derivative += ratio / (above + step)
        product = product * ratio.add_(1)
    value -= product.log() - theta.log()
    return value, derivative if slope else None


@dataclass(frozen=True)
class _Stored:
    """Terms of stored counts, of which slope and gradient are less those of zeros in their place, (n,) each."""

    loss: Tensor
    slope: Tensor
    grad_theta: Tensor | None

    @classmethod
    def of(cls, x: Tensor, theta: Tensor, log_r: Tensor, weight: Tensor | None, *, needs_grad: bool) -> _Stored:
        """Terms of counts ``x`` with dispersion ``theta`` and log(mu / theta) ``log_r``."""
        gammas, digammas = gamma_differences(x, theta, slope=needs_grad)
        # -log(r / (1 + r)), and not a difference of logarithms; likewise 1 / (1 + r), and not 1 - r / (1 + r)
        loss = torch.lgamma(x + 1).sub_(gammas).addcmul_(x, F.softplus(-log_r))
        slope = torch.sigmoid(-log_r).mul_(x).neg_()
        grad_theta = None if digammas is None else digammas.neg_().sub_(slope / theta)
        if weight is not None:
            more, log_ratio, u = weight - 1, F.softplus(log_r), torch.sigmoid(log_r)
            loss = weight * loss + more * theta * log_ratio
            slope = weight * slope + more * theta * u
            if grad_theta is not None:
                grad_theta = weight * grad_theta + more * (log_ratio - u)
        return cls(loss, slope, grad_theta)
