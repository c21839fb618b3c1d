"""Flow attention with its gradient written by hand, for a CPU: over one sample, in few passes, and over few cells, by pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-6


def flow_attention(x: Tensor, qkv: nn.Linear, out: nn.Linear, n_heads: int) -> Tensor:
    r"""Flow attention between all rows, from ``x`` to the output projection, (n_cells, n_hidden) -> the same.

    The formulas are those of :meth:`cellplm_scvi.nn.FlowAttention.attend`. As attention is linear in the values, they and
    the output projection go into the matrix that is the same for all cells,

    .. math::
        \mathrm{out}_i = \sum_h g_{ih}\,\phi(q_{ih}) \Big(\sum_j c_{jh}\,\phi(k_{jh})^\top x_j\Big) W^V_h W^O_h

    with gate g and competition c, and no values of cells are ever made. The gradient is written by hand: queries and keys
    are gone through side by side, and two numbers a cell and unit wait for the backward pass beside ``x``. Sums over cells
    are float32, but for products with ``x`` under autocast, which take its dtype and add up in float32.
    """
    tensors: tuple[Tensor, ...] = (x, qkv.weight, qkv.bias, out.weight, out.bias)
    if torch.is_autocast_enabled("cpu"):
        tensors = tuple(t.to(torch.get_autocast_dtype("cpu")) for t in tensors)
    with torch.autocast("cpu", enabled=False):
        return _FlowAttention.apply(*tensors, n_heads)


class _FlowAttention(torch.autograd.Function):
    """``both`` are queries and keys side by side, (n_cells, 2 * n_hidden), and vectors (2 * n_heads, d) go with them.

    Queries meet what was summed over keys and keys what was summed over queries: hence the exchange of halves.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, n_heads: int) -> Tensor:
        n_cells, n_hidden = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        both = torch.addmm(b_in[: 2 * n_hidden], x, w_in[: 2 * n_hidden].T).to(wide).sigmoid_()
        q, k = _heads(both, 2, n_heads)
        total = _exchange(both.sum(0).view(2 * n_heads, -1)) + EPS
        inverse = 1 / _dot(both, total, EPS)  # of incoming and outgoing flow, (n_cells, 2 * n_heads)
        weighted = _exchange(_weighted_sum(both, inverse)) + EPS
        conserved_in, conserved_out = _dot(both, weighted, EPS).chunk(2, 1)
        competition = conserved_out.clamp(-1.0, 1.0).softmax(0) * n_cells
        gate = inverse[:, :n_heads] * conserved_in.sigmoid()

        keys = (k * competition[..., None]).flatten(1)
        key_sum = keys.sum(0).to(x.dtype).view(n_heads, -1)
        sums = torch.mm(keys.to(x.dtype).T, x).view(n_heads, -1, n_hidden)
        values, bias, onward = _by_head(w_in, b_in, w_out, n_heads)
        products = torch.baddbmm(key_sum[..., None] * bias[:, None], sums, values.transpose(1, 2))
        matrix = torch.bmm(products, onward).view(n_hidden, n_hidden)
        mixed = torch.addmm(b_out, (q * gate[..., None]).flatten(1).to(x.dtype), matrix)
        ctx.save_for_backward(
            x, w_in, b_in, w_out, both, total, weighted, inverse, conserved_in, conserved_out, competition,
            key_sum, sums, products,
        )  # fmt: skip
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
        (x, w_in, b_in, w_out, both, total, weighted, inverse, conserved_in, conserved_out, competition,
         key_sum, sums, products) = ctx.saved_tensors  # fmt: skip
        (n_cells, n_hidden), n_heads, dtype, wide = x.shape, products.shape[0], x.dtype, both.dtype
        grad_both = torch.empty_like(both)
        (q, k), (grad_q, grad_k) = _heads(both, 2, n_heads), _heads(grad_both, 2, n_heads)
        values, bias, onward = _by_head(w_in, b_in, w_out, n_heads)
        opened = conserved_in.sigmoid()
        gate = inverse[:, :n_heads] * opened

        grad_x = grad_w_in = grad_b_in = grad_w_out = grad_b_out = None
        # what is of the size of x or of a weight is let go of as soon as it can be
        grad_matrix = torch.mm((q * gate[..., None]).flatten(1).to(dtype).T, grad_mixed).view(n_heads, -1, n_hidden)
        # the matrix again, instead of keeping it
        back = torch.mm(grad_mixed, torch.bmm(products, onward).view(n_hidden, n_hidden).T).to(wide).view_as(q)
        grad_gate = (back * q).sum(2)
        torch.mul(back, gate[..., None], out=grad_q)
        grad_products = torch.bmm(grad_matrix, onward.transpose(1, 2))
        if ctx.needs_input_grad[3]:
            grad_w_out = torch.empty_like(w_out)
            by_head = grad_w_out.unflatten(1, (n_heads, -1)).transpose(0, 1)
            torch.bmm(grad_matrix.transpose(1, 2), products, out=by_head)
        del grad_matrix
        grad_sums = torch.bmm(grad_products, values).view(n_hidden, n_hidden)
        grad_key_sum = torch.bmm(grad_products, bias[..., None]).view(n_hidden)
        back = torch.addmm(grad_key_sum, x, grad_sums.T).to(wide).view_as(k)
        grad_competition = (back * k).sum(2)
        torch.mul(back, competition[..., None], out=grad_k)
        del back

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
        grad_both = grad_both.to(dtype)

        if ctx.needs_input_grad[0]:
            grad_x = torch.mm((k * competition[..., None]).flatten(1).to(dtype), grad_sums)
            grad_x.addmm_(grad_both, w_in[: 2 * n_hidden])
        del grad_sums
        if ctx.needs_input_grad[1]:
            grad_w_in = torch.empty_like(w_in)
            torch.mm(grad_both.T, x, out=grad_w_in[: 2 * n_hidden])
            grad_values = grad_w_in[2 * n_hidden :].view(values.shape)
            torch.bmm(grad_products.transpose(1, 2), sums, out=grad_values)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.bmm(key_sum[:, None], grad_products).view(n_hidden)
            grad_b_in = torch.cat([grad_both.sum(0), grad_bias])
        if ctx.needs_input_grad[4]:
            grad_b_out = grad_mixed.sum(0)
        return grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out, None


def flow_attention_of_pairs(qkv: Tensor, same: Tensor, n_heads: int) -> Tensor:
    r"""Flow attention within samples by pairs of cells, (n_cells, 3 * n_hidden) -> (n_cells, n_hidden).

    The formulas are those of :meth:`cellplm_scvi.nn.FlowAttention.attend`, written with
    :math:`S_{ij} = \phi(q_i) \cdot \phi(k_j)`, 0 where i and j are of different samples: incoming and outgoing flow are its sums over
    rows and columns, and the result is a product with it. For so few cells that all their pairs are a small matrix, this
    takes fewer operations, whose number then is what takes time.

    Parameters
    ----------
    qkv
        Queries, keys and values, one beside the other.
    same
        1 where two cells are of one sample, 0 elsewhere, (n_cells, n_cells).
    n_heads
        Number of heads.
    """
    with torch.autocast("cpu", enabled=False):
        return _FlowAttentionOfPairs.apply(qkv, same, n_heads)


class _FlowAttentionOfPairs(torch.autograd.Function):
    """``both`` are queries, then keys, (2 * n_heads, n_cells, d); what else has 2 * n_heads rows goes with them."""

    @staticmethod
    def forward(ctx, qkv: Tensor, same: Tensor, n_heads: int) -> Tensor:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        same = same.to(wide)
        rows = qkv.to(wide).unflatten(1, (3 * n_heads, -1)).transpose(0, 1)
        both, v = rows[: 2 * n_heads].sigmoid(), rows[2 * n_heads :]
        q, k = both.chunk(2)
        own = both.sum(2).mul_(EPS)
        products = torch.bmm(q, k.transpose(1, 2)).mul_(same)
        # (q + eps) . k and q . (k + eps)
        from_query = torch.addcmul(products, own[n_heads:, None], same)
        from_key = torch.addcmul(products, own[:n_heads, :, None], same)
        own += both.shape[2] * EPS**2
        inverse = torch.cat([from_query.sum(2), from_key.sum(1)]).add_(own).reciprocal_()
        incoming, outgoing = inverse.chunk(2)
        conserved_in = (from_query @ outgoing[..., None])[..., 0].add_(own[:n_heads])
        conserved_out = (incoming[:, None] @ from_key)[:, 0].add_(own[n_heads:])
        exp = conserved_out.clamp(-1.0, 1.0).exp_()
        competition = exp * (same.sum(1) / (exp @ same))
        weighted = v * competition[..., None]
        sums = torch.bmm(products, weighted)
        mixed = sums.new_empty(rows.shape[1], n_heads, rows.shape[2])
        torch.mul(sums, (incoming * conserved_in.sigmoid())[..., None], out=mixed.transpose(0, 1))
        ctx.save_for_backward(
            same, both, v, products, from_query, from_key, inverse, conserved_in, conserved_out, competition,
            weighted, sums,
        )  # fmt: skip
        ctx.dtype = qkv.dtype
        return mixed.flatten(1).to(qkv.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
        (same, both, v, products, from_query, from_key, inverse, conserved_in, conserved_out, competition,
         weighted, sums) = ctx.saved_tensors  # fmt: skip
        n_heads, n_cells, d = v.shape
        (q, k), (incoming, outgoing) = both.chunk(2), inverse.chunk(2)
        opened = conserved_in.sigmoid()
        gate = incoming * opened
        grad_rows = v.new_empty(n_cells, 3 * n_heads, d)
        grad_q_k, grad_v = grad_rows.transpose(0, 1).split([2 * n_heads, n_heads])

        grad_mixed = grad_mixed.to(v.dtype).unflatten(1, (n_heads, -1)).transpose(0, 1)
        grad_gate = (grad_mixed * sums).sum(2)
        grad_sums = grad_mixed * gate[..., None]
        grad_weighted = torch.bmm(products.transpose(1, 2), grad_sums)
        torch.mul(grad_weighted, competition[..., None], out=grad_v)
        grad_share = (grad_weighted * v).sum(2).mul_(competition)
        grad_share -= competition * ((grad_share @ same) / same.sum(1))
        grad_share *= conserved_out.abs() <= 1

        grad_conserved_in = grad_gate * gate * (1 - opened)
        grad_incoming = torch.addcmul((from_key @ grad_share[..., None])[..., 0], grad_gate, opened)
        grad_outgoing = (grad_conserved_in[:, None] @ from_query)[:, 0]
        grad_flow = torch.cat([grad_incoming, grad_outgoing]).mul_(inverse.square()).neg_()
        grad_in, grad_out = grad_flow.chunk(2)
        # what queries and keys add to the gradient of a pair, one beside the other: a single product for all
        one = torch.ones_like(incoming)
        by_query = torch.cat([grad_sums, torch.stack([grad_in, grad_conserved_in, one, incoming], 2)], 2)
        by_key = torch.cat([weighted, torch.stack([one, outgoing, grad_out, grad_share], 2)], 2)
        grad_products = torch.bmm(by_query, by_key.transpose(1, 2)).mul_(same)
        # what eps adds: each query meets all keys of its sample and itself, and the other way round
        grad_own = torch.stack([grad_out, grad_share, grad_in, grad_conserved_in])
        of_keys_out, of_keys_share, of_queries_in, of_queries_conserved = grad_own @ same
        grad_query = of_keys_out + incoming * of_keys_share + grad_in + grad_conserved_in
        grad_key = of_queries_in + outgoing * of_queries_conserved + grad_out + grad_share
        grad_both = torch.cat(
            [
                torch.baddbmm(grad_query[..., None], grad_products, k, beta=EPS),
                torch.baddbmm(grad_key[..., None], grad_products.transpose(1, 2), q, beta=EPS),
            ]
        )
        torch.ops.aten.sigmoid_backward.grad_input(grad_both, both, grad_input=grad_q_k)
        return grad_rows.flatten(1).to(ctx.dtype), None, None


def _heads(rows: Tensor, n_parts: int, n_heads: int) -> tuple[Tensor, ...]:
    """Parts of rows, each (n_cells, n_heads, d)."""
    return rows.unflatten(1, (n_parts, n_heads, -1)).unbind(1)


def _by_head(w_in: Tensor, b_in: Tensor, w_out: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the values, (n_heads, d, n_hidden) and (n_heads, d), and what they are multiplied with next."""
    n_hidden = w_out.shape[0]
    values, bias = w_in[2 * n_hidden :].view(n_heads, -1, n_hidden), b_in[2 * n_hidden :].view(n_heads, -1)
    return values, bias, w_out.T.unflatten(0, (n_heads, -1))


def _exchange(vectors: Tensor) -> Tensor:
    """What is of queries where keys were, and the other way round."""
    return vectors.roll(vectors.shape[0] // 2, 0)


def _dot(both: Tensor, vectors: Tensor, eps: float = 0.0) -> Tensor:
    """(rows + eps) . vector by heads, (n_cells, 2 * n_heads)."""
    # one product with a block-diagonal matrix is quicker than one for each head
    n = vectors.shape[0]
    blocks = vectors[..., None] * torch.eye(n, dtype=vectors.dtype, device=vectors.device)[:, None]
    result = both @ blocks.view(-1, n)
    return result.add_(eps * vectors.sum(1)) if eps else result


def _weighted_sum(both: Tensor, weights: Tensor, eps: float = 0.0) -> Tensor:
    """Sum over cells of (rows + eps) times weights (n_cells, 2 * n_heads), (2 * n_heads, d)."""
    # of all pairs of heads, and the equal ones picked
    result = (weights.T @ both).unflatten(1, (weights.shape[1], -1)).diagonal().T
    return result + eps * weights.sum(0)[:, None] if eps else result
