"""Flow attention over one sample and its gradient, each in few passes over the cells, for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6


def flow_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Flow attention between all rows in float32, (n_cells, 3 * n_hidden) -> (n_cells, n_hidden).

    The formulas are those of :meth:`cellplm_scvi.nn.FlowAttention.attend`; the gradient is written by hand. Queries and
    keys are gone through side by side, gradients are written where that of ``qkv`` lies, and three numbers a cell and
    unit wait for the backward pass instead of nine.
    """
    return _FlowAttention.apply(qkv, n_heads)


class _FlowAttention(torch.autograd.Function):
    """``both`` are queries and keys side by side, (n_cells, 2 * n_hidden), and vectors (2 * n_heads, d) go with them.

    Queries meet what was summed over keys and keys what was summed over queries: hence the exchange of halves.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, n_heads: int) -> Tensor:
        n_cells, n_hidden = qkv.shape[0], qkv.shape[1] // 3
        rows = torch.empty_like(qkv, dtype=torch.float32)
        torch.sigmoid(qkv[:, : 2 * n_hidden].float(), out=rows[:, : 2 * n_hidden])
        rows[:, 2 * n_hidden :] = qkv[:, 2 * n_hidden :]
        both = rows[:, : 2 * n_hidden]
        q, k, v = _heads(rows, 3, n_heads)
        total = _exchange(both.sum(0).view(2 * n_heads, -1)) + EPS
        inverse = 1 / _dot(both, total, EPS)  # of incoming and outgoing flow, (n_cells, 2 * n_heads)
        weighted = _exchange(_weighted_sum(both, inverse)) + EPS
        conserved_in, conserved_out = _dot(both, weighted, EPS).chunk(2, 1)
        competition = conserved_out.clamp(-1.0, 1.0).softmax(0) * n_cells
        products = _outer(k, v * competition[..., None])
        gate = inverse[:, :n_heads] * conserved_in.sigmoid()
        mixed = _times(q, products).mul_(gate[..., None])
        ctx.save_for_backward(rows, total, weighted, inverse, conserved_in, conserved_out, competition, products)
        return mixed.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed: Tensor) -> tuple[Tensor, None]:
        rows, total, weighted, inverse, conserved_in, conserved_out, competition, products = ctx.saved_tensors
        (n_cells, n_hidden), n_heads = grad_mixed.shape, products.shape[0]
        grad = torch.empty_like(rows)
        both, grad_both = rows[:, : 2 * n_hidden], grad[:, : 2 * n_hidden]
        (q, k, v), (grad_q, grad_k, grad_v) = _heads(rows, 3, n_heads), _heads(grad, 3, n_heads)
        (grad_mixed,) = _heads(grad_mixed.float(), 1, n_heads)
        opened = conserved_in.sigmoid()
        gate = inverse[:, :n_heads] * opened

        grad_products = _outer(q, grad_mixed * gate[..., None])
        back = _times(grad_mixed, products.transpose(1, 2))
        grad_gate = (back * q).sum(2)
        torch.mul(back, gate[..., None], out=grad_q)
        back = _times(k, grad_products)
        grad_competition = (back * v).sum(2)
        torch.mul(back, competition[..., None], out=grad_v)
        torch.mul(_times(v, grad_products.transpose(1, 2)), competition[..., None], out=grad_k)

        grad_share = competition * grad_competition
        grad_share -= competition * (grad_share.sum(0) / n_cells)
        grad_share *= conserved_out.abs() <= 1
        grad_conserved = torch.cat([grad_gate * gate * (1 - opened), grad_share], 1)
        grad_weighted = _exchange(_weighted_sum(both, grad_conserved, EPS))
        grad_inverse = _dot(both, grad_weighted)
        grad_inverse[:, :n_heads] += grad_gate * opened
        grad_flow = grad_inverse.mul_(inverse.square()).neg_()
        grad_total = _exchange(_weighted_sum(both, grad_flow, EPS))
        weights = torch.stack([grad_conserved, inverse, grad_flow], 2).transpose(0, 1)  # (2 * n_heads, n_cells, 3)
        vectors = torch.stack([weighted, grad_weighted, total], 1)
        grad_both.unflatten(1, (2 * n_heads, -1)).transpose(0, 1).baddbmm_(weights, vectors)
        grad_both += grad_total.flatten()
        torch.ops.aten.sigmoid_backward.grad_input(grad_both, both, grad_input=grad_both)
        return grad, None


def _heads(rows: Tensor, n_parts: int, n_heads: int) -> tuple[Tensor, ...]:
    """Parts of rows, each (n_cells, n_heads, d)."""
    return rows.unflatten(1, (n_parts, n_heads, -1)).unbind(1)


def _exchange(vectors: Tensor) -> Tensor:
    """What is of queries where keys were, and the other way round."""
    return vectors.roll(vectors.shape[0] // 2, 0)


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows of each head times its matrix, (n_cells, n_heads, d) by (n_heads, d, d) -> (n_cells, n_heads, d)."""
    return torch.bmm(rows.transpose(0, 1), matrices).transpose(0, 1)


def _outer(rows: Tensor, others: Tensor) -> Tensor:
    """Sum of outer products by heads, (n_cells, n_heads, d) twice -> (n_heads, d, d)."""
    return torch.bmm(rows.permute(1, 2, 0), others.transpose(0, 1))


def _dot(both: Tensor, vectors: Tensor, eps: float = 0.0) -> Tensor:
    """(rows + eps) . vector by heads, (n_cells, 2 * n_heads)."""
    # one product with a block-diagonal matrix is quicker than one for each head
    n = vectors.shape[0]
    result = both @ (vectors[..., None] * torch.eye(n, device=vectors.device)[:, None]).view(-1, n)
    return result.add_(eps * vectors.sum(1)) if eps else result


def _weighted_sum(both: Tensor, weights: Tensor, eps: float = 0.0) -> Tensor:
    """Sum over cells of (rows + eps) times weights (n_cells, 2 * n_heads), (2 * n_heads, d)."""
    # of all pairs of heads, and the equal ones picked
    result = (weights.T @ both).unflatten(1, (weights.shape[1], -1)).diagonal().T
    return result + eps * weights.sum(0)[:, None] if eps else result
