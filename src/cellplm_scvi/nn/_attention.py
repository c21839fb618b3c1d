"""Attention over the cells of a sample, for several samples packed into one minibatch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._dropout import dropout
from ._flow import EPS, flow_attention, flow_attention_of_pairs
from ._sparse import CACHE_ENTRIES

#: cells of several samples among which, in training, pairs are fewer operations than sums over samples
FEW_CELLS = 192


@dataclass(frozen=True)
class Packing:
    """Which rows of a minibatch belong to one sample (or to one slice of a large sample).

    The rows of a sample are contiguous. For products over the cells of a sample, rows are laid out as blocks of equal
    length that never cross a sample's border, so that hundreds of small samples and one large one take the same few
    batched matrix products.

    Parameters
    ----------
    lengths
        Number of cells of each packed sample, (n_samples,).
    """

    lengths: Tensor

    @property
    def n_samples(self) -> int:
        return self.lengths.shape[0]

    @cached_property
    def segment(self) -> Tensor:
        """Sample of each row, (n_cells,)."""
        samples = torch.arange(self.n_samples, device=self.lengths.device)
        return torch.repeat_interleave(samples, self.lengths)

    @cached_property
    def same(self) -> Tensor:
        """1 where two rows are of one sample, 0 elsewhere, (n_cells, n_cells)."""
        return (self.segment[:, None] == self.segment).float()

    @cached_property
    def block_size(self) -> int:
        """Rows of a block: about a quarter of the mean sample, so that little is padded."""
        if self.n_samples == 1:
            return int(self.lengths[0])
        mean = float(self.lengths.float().mean())
        return max(8, min(256, 1 << int(max(mean / 4, 1)).bit_length()))

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor, int]:
        """Slot of each row in the block layout, sample of each block, number of blocks."""
        size = self.block_size
        blocks = (self.lengths + size - 1) // size
        first_block = blocks.cumsum(0) - blocks
        first_row = self.lengths.cumsum(0) - self.lengths
        within = torch.arange(self.segment.shape[0], device=self.lengths.device) - first_row[self.segment]
        slots = first_block[self.segment] * size + within
        block_sample = torch.repeat_interleave(torch.arange(self.n_samples, device=self.lengths.device), blocks)
        return slots, block_sample, block_sample.shape[0]

    @property
    def block_sample(self) -> Tensor:
        """Sample of each block, (n_blocks,)."""
        return self._slots[1]

    def to_blocks(self, rows: Tensor) -> Tensor:
        """(n_cells, ...) -> (n_blocks, block_size, ...), padded with zeros."""
        if self.n_samples == 1:
            return rows[None]
        slots, _, n_blocks = self._slots
        blocks = rows.new_zeros(n_blocks * self.block_size, *rows.shape[1:])
        return blocks.index_copy(0, slots, rows).view(n_blocks, self.block_size, *rows.shape[1:])

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Inverse of :meth:`to_blocks`."""
        if self.n_samples == 1:
            return blocks[0]
        return blocks.flatten(0, 1).index_select(0, self._slots[0])

    def sum(self, rows: Tensor) -> Tensor:
        """Sum over the cells of each sample, (n_cells, ...) -> (n_samples, ...), in float32."""
        rows = rows.float()
        if self.n_samples == 1:
            return rows.sum(0, keepdim=True)
        return rows.new_zeros(self.n_samples, *rows.shape[1:]).index_add(0, self.segment, rows)

    def weighted_sum(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Sum over the cells of each sample, (n_cells, n_heads, d) by (n_cells, n_heads) -> (n_samples, n_heads, d)."""
        if self.n_samples == 1:
            # of all pairs of heads, and the equal ones picked: one product is quicker than one for each head
            pairs = (weight.T @ rows.flatten(1)).unflatten(1, rows.shape[1:])
            return pairs.diagonal().T[None]
        return self.sum(rows * weight[..., None])

    def dot(self, rows: Tensor, of_sample: Tensor) -> Tensor:
        """Product with a vector of the cell's sample, (n_cells, n_heads, d) by (n_samples, n_heads, d)."""
        if self.n_samples == 1:
            return rows.flatten(1) @ torch.block_diag(*of_sample[0]).T
        return (rows * of_sample.index_select(0, self.segment)).sum(-1)

    def softmax(self, rows: Tensor) -> Tensor:
        """Softmax over the cells of each sample, of values of bounded size, (n_cells, ...), in float32."""
        exp = rows.float().exp()
        return exp / self.sum(exp).index_select(0, self.segment)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of each sample side by side: index (n_samples, longest) into the rows, which are real, and where they lie."""
        longest = int(self.lengths.max())
        place = torch.arange(longest, device=self.lengths.device)
        real = place < self.lengths[:, None]
        first = self.lengths.cumsum(0) - self.lengths
        return torch.where(real, first[:, None] + place, 0), real, real.flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class Neighbourhood:
    """The nearest cells of each cell inside its own sample.

    Parameters
    ----------
    index
        Row in the minibatch of each neighbour, (n_cells, k); -1 where there is none.
    distance
        Distance to it in units of the sample's typical cell spacing, (n_cells, k).
    """

    index: Tensor
    distance: Tensor

    @cached_property
    def present(self) -> Tensor:
        """Which neighbours exist, (n_cells, k)."""
        return self.index >= 0

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of the neighbours, (n_cells, ...) -> (n_cells, k, ...); row 0 where there is no neighbour."""
        # The backward pass of index_select adds whole rows; that of rows[index] adds single numbers, far slower.
        picked = rows.index_select(0, self.index.clamp_min(0).flatten())
        return picked.view(*self.index.shape, *rows.shape[1:])

    def split(self, n_cells: int) -> list[Neighbourhood]:
        """Parts for ``n_cells`` cells each, whose neighbours are still rows of the whole."""
        return [
            Neighbourhood(*part) for part in zip(self.index.split(n_cells), self.distance.split(n_cells), strict=True)
        ]


class Attention(nn.Module, ABC):
    """Multi-head attention over packed samples."""

    def __init__(self, n_hidden: int, n_heads: int, dropout_rate: float = 0.0):
        super().__init__()
        if n_hidden % n_heads:
            raise ValueError(f"n_hidden ({n_hidden}) must be a multiple of n_heads ({n_heads}).")
        self.n_heads = n_heads
        self.dropout_rate = dropout_rate
        self.qkv = nn.Linear(n_hidden, 3 * n_hidden)
        self.out = nn.Linear(n_hidden, n_hidden)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (n_cells, 3 * n_hidden) -> three of (n_cells, n_heads, d_head)."""
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        return q, k, v

    def dropped(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout_rate, self.training)


class GlobalAttention(Attention):
    """Attention between all the cells of a sample."""

    @staticmethod
    def prepare(packing: Packing) -> None:
        """Compute what :meth:`attend` needs of the packing and a compiled graph cannot: sizes that depend on lengths."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """(n_cells, n_heads, d_head) three times -> the same shape."""

    def mix(self, x: Tensor, packing: Packing) -> Tensor:
        """Projections and what is between, (n_cells, n_hidden) -> (n_cells, n_hidden)."""
        return self.out(self.attend(*self.heads(self.qkv(x)), packing).flatten(1).to(x.dtype))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """Mix the cells of each packed sample, (n_cells, n_hidden) -> (n_cells, n_hidden)."""
        return self.dropped(self.mix(x, packing))


class FlowAttention(GlobalAttention):
    r"""Flowformer's linear attention (Wu et al. 2022): cost linear in the number of cells.

    With :math:`\phi` the sigmoid, incoming flow :math:`I_i = \phi(q_i)\sum_j\phi(k_j)`, outgoing flow
    :math:`O_j = \phi(k_j)\sum_i\phi(q_i)` and their conserved counterparts :math:`I'_i = \phi(q_i)\sum_j\phi(k_j)/O_j`
    and :math:`O'_j = \phi(k_j)\sum_i\phi(q_i)/I_i` (clamped to [-1, 1]),

    .. math::
        \mathrm{out}_i = \sigma(I'_i)\,\frac{\phi(q_i)}{I_i}\sum_j\phi(k_j)^\top\,\mathrm{softmax}_j(O')\,N\,v_j .

    Sums over cells are added up in float32.
    """

    @staticmethod
    def prepare(packing: Packing) -> None:
        if packing.n_samples > 1:
            packing.block_sample  # noqa: B018
        packing.segment  # noqa: B018

    def mix(self, x: Tensor, packing: Packing) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            # its matrices of n_hidden x n_hidden pay where there are cells enough
            if packing.n_samples == 1 and 2 * x.shape[0] >= x.shape[1]:
                return flow_attention(x, self.qkv, self.out, self.n_heads)
            # in training alone: an embedding must not change a bit with the samples that are computed beside it
            if self.training and packing.n_samples > 1 and x.shape[0] <= FEW_CELLS:
                return self.out(flow_attention_of_pairs(self.qkv(x), packing.same, self.n_heads))
        return super().mix(x, packing)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        q, k, v = q.float().sigmoid(), k.float().sigmoid(), v.float()
        incoming = 1 / _flow(q, packing.sum(k), packing)  # (n_cells, n_heads)
        outgoing = 1 / _flow(k, packing.sum(q), packing)
        conserved_in = _flow(q, packing.weighted_sum(k, outgoing), packing)
        conserved_out = _flow(k, packing.weighted_sum(q, incoming), packing).clamp(-1.0, 1.0)
        competition = packing.softmax(conserved_out) * packing.lengths.float()[packing.segment][:, None]
        # both factors of the result's rows at once: one pass over q instead of two over cells x width
        q = q * (incoming * conserved_in.sigmoid())[..., None]
        return self._products(q, k, v * competition[..., None], packing)

    @staticmethod
    def _products(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """q_i @ sum_j k_j^T v_j within each sample, (n_cells, n_heads, d_head)."""
        q, k, v = (packing.to_blocks(t).transpose(1, 2) for t in (q, k, v))  # (n_blocks, n_heads, size, d_head)
        products = k.transpose(-1, -2) @ v  # (n_blocks, n_heads, d_head, d_head)
        if packing.n_samples > 1:
            per_sample = products.new_zeros(packing.n_samples, *products.shape[1:])
            products = per_sample.index_add(0, packing.block_sample, products)
            products = products.index_select(0, packing.block_sample)
        return packing.from_blocks((q @ products).transpose(1, 2))


def _flow(rows: Tensor, total: Tensor, packing: Packing) -> Tensor:
    """(rows + eps) . (total + eps) without a copy of the rows, (n_cells, n_heads)."""
    total = total + EPS
    per_sample = EPS * total.sum(-1)
    return packing.dot(rows, total) + (
        per_sample if packing.n_samples == 1 else per_sample.index_select(0, packing.segment)
    )


class SoftmaxAttention(GlobalAttention):
    """Exact softmax attention through torch's fused kernel, over samples padded to the longest."""

    @staticmethod
    def prepare(packing: Packing) -> None:
        if packing.n_samples > 1:
            packing.padded  # noqa: B018

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        if packing.n_samples == 1:
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v)
            return mixed[0].transpose(0, 1)
        index, real, places = packing.padded
        q, k, v = (
            t.index_select(0, index.flatten()).view(*index.shape, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, places)


class LocalAttention(Attention):
    """Attention over the nearest cells, biased by distance: shift, rotation and mirroring change nothing.

    Each head subtracts its own (positive, learned) slope times the distance from the logits; slopes start on a
    geometric scale, so that some heads see the next cells and others the whole neighbourhood. A cell without
    coordinates has no neighbours and gets zero.
    """

    def __init__(self, n_hidden: int, n_heads: int, dropout_rate: float = 0.0):
        super().__init__(n_hidden, n_heads, dropout_rate)
        slopes = torch.logspace(0, -2, n_heads, base=2.0) if n_heads > 1 else torch.ones(1)
        self.log_slope = nn.Parameter(slopes.log())

    def forward(self, x: Tensor, neighbourhood: Neighbourhood) -> Tensor:
        """(n_cells, n_hidden) -> (n_cells, n_hidden)."""
        q, k, v = self.heads(self.qkv(x))
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            # each cell brings k neighbours: so many cells at a time that these fit the cache
            size = max(1, CACHE_ENTRIES // 4 // max(neighbourhood.index.shape[1] * x.shape[1], 1))
            k, v = k.contiguous(), v.contiguous()
            parts = zip(q.split(size), neighbourhood.split(size), strict=True)
            mixed = torch.cat([self._mix(rows, k, v, near) for rows, near in parts])
        else:
            mixed = self._mix(q, k, v, neighbourhood)
        return self.dropped(self.out(mixed.flatten(1)))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, near: Neighbourhood) -> Tensor:
        """Weighted mean of the neighbours' values for each row of ``q``, (n_rows, n_heads, d_head)."""
        k, v = near.gather(k), near.gather(v)  # (n_rows, k, n_heads, d_head)
        logits = (q[:, None] * k).sum(-1).float() / q.shape[-1] ** 0.5
        logits = logits - near.distance[..., None] * self.log_slope.exp()
        present = near.present[..., None]
        # A finite fill keeps rows without any neighbour free of NaN; the product with `present` makes them zero.
        weights = logits.masked_fill(~present, -1e4).softmax(1) * present
        return (weights.to(v.dtype)[..., None] * v).sum(1)
