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

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._sparse import SparseCounts

#: entries of one chunk: its handful of float32 temporaries stay in a CPU's cache
CHUNK_ENTRIES = 1 << 19


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


def softmax_nb_loss(
    h: Tensor,
    counts: SparseCounts,
    library: Tensor,
    output: GeneOutput,
    weight: Tensor,
    panel: Tensor | None = None,
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

    Returns
    -------
    The weighted sum, and the negative log-likelihood of each cell, (n_cells,), without a gradient.
    """
    with torch.autocast(h.device.type, enabled=False):
        return _SoftmaxNB.apply(
            h.float(),
            output.weight.float(),
            output.bias.float(),
            output.log_theta.float(),
            weight.float(),
            library.float(),
            counts,
            output.measured if panel is not None else None,
            panel,
            output.rest,
        )


class _SoftmaxNB(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
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
    ) -> tuple[Tensor, Tensor]:
        n_cells, n_genes = h.shape[0], w.shape[0]
        theta = log_theta.exp()
        needs_grad = any(ctx.needs_input_grad[:4])
        loss = _loss_of_gamma_functions(counts, theta)
        grads = [torch.zeros_like(t) for t in (h, w, b, log_theta)] if needs_grad else []
        chunk = max(1, CHUNK_ENTRIES // n_genes)
        starts = range(0, n_cells, chunk)
        # one transfer to the host for all chunks
        bounds = counts.offsets[torch.tensor([*starts, n_cells], device=counts.offsets.device)].tolist()
        for n, start in enumerate(starts):
            rows = slice(start, min(start + chunk, n_cells))
            entries = slice(bounds[n], bounds[n + 1])
            x, genes, cells = counts.values[entries], counts.genes[entries], counts.rows[entries] - start
            log_p = torch.addmm(b, h[rows], w.T)
            if measured is not None and panel is not None:
                log_p.masked_fill_(~measured[panel[rows]], -torch.inf)
            log_p -= log_total(log_p, rest)
            log_library = library[rows].clamp_min(1e-8).log()
            log_mu = log_p[cells, genes] + log_library[cells]
            p = log_p.exp_()
            mu = p * library[rows, None]
            log_ratio = torch.log1p(mu / theta)
            loss[rows] += log_ratio @ theta
            loss[rows].index_add_(0, cells, x * (log_ratio[cells, genes] - log_mu + log_theta[genes]))
            if not needs_grad:
                continue
            # slope of the loss in log mu: mu (theta + x) / (theta + mu) - x
            denominator = mu + theta
            slope = mu / denominator
            grad_theta = log_ratio.sub_(slope)
            at = slope[cells, genes]
            slope *= theta
            slope.index_put_((cells, genes), x * (at - 1), accumulate=True)
            grad_theta.index_put_(
                (cells, genes),
                torch.digamma(theta)[genes] - torch.digamma(x + theta[genes]) + x / denominator[cells, genes],
                accumulate=True,
            )
            grad_logits = slope - p * slope.sum(1, keepdim=True)
            grad_logits *= weight[rows, None]
            grads[0][rows] = grad_logits @ w
            grads[1].addmm_(grad_logits.T, h[rows])
            grads[2] += grad_logits.sum(0)
            grads[3] += (weight[rows] @ grad_theta) * theta
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(loss)
        return weight @ loss, loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor, _grad_loss: Tensor | None):
        return (*(grad_sum * g for g in ctx.saved_tensors), None, None, None, None, None, None)


def _loss_of_gamma_functions(counts: SparseCounts, theta: Tensor) -> Tensor:
    """Sum over the non-zero counts of lgamma(theta) + lgamma(x + 1) - lgamma(x + theta), (n_cells,)."""
    theta_at = theta[counts.genes]
    terms = torch.lgamma(theta)[counts.genes] + torch.lgamma(counts.values + 1) - torch.lgamma(counts.values + theta_at)
    return theta.new_zeros(counts.n_cells).index_add_(0, counts.rows, terms)
