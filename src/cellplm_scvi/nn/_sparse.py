"""Counts of a minibatch in compressed sparse rows, as three plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: numbers of a table that stay in the cache of a CPU while its rows are added
CACHE_ENTRIES = 1 << 21


@dataclass(frozen=True)
class SparseCounts:
    """A CSR matrix of counts.

    Plain tensors, unlike :func:`torch.sparse_csr_tensor`, can be pinned, sent between worker processes, and indexed.

    Parameters
    ----------
    values
        Non-zero counts, (n_nonzero,).
    genes
        Gene (column) of each of them, (n_nonzero,).
    offsets
        Where each cell's entries begin, (n_cells + 1,).
    n_genes
        Number of columns.
    """

    values: Tensor
    genes: Tensor
    offsets: Tensor
    n_genes: int

    @property
    def n_cells(self) -> int:
        return self.offsets.shape[0] - 1

    @cached_property
    def rows(self) -> Tensor:
        """Cell (row) of each entry, (n_nonzero,), as int32, which takes half the memory."""
        cells = torch.arange(self.n_cells, dtype=torch.int32, device=self.offsets.device)
        return torch.repeat_interleave(cells, self.offsets.diff(), output_size=self.values.shape[0])

    def with_values(self, values: Tensor) -> SparseCounts:
        """The same non-zero pattern with other values."""
        other = replace(self, values=values)
        if "rows" in self.__dict__:  # computed already
            other.__dict__["rows"] = self.rows
        return other

    def select(self, cells: Tensor) -> SparseCounts:
        """Rows where ``cells``, (n_cells,) boolean, is true."""
        keep = cells[self.rows]
        lengths = self.offsets.diff()[cells]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return SparseCounts(self.values[keep], self.genes[keep], offsets, self.n_genes)

    def sum(self) -> Tensor:
        """Total of each cell, (n_cells,)."""
        return segment_sums(self.values, self.offsets)

    def matmul(self, dense: Tensor) -> Tensor:
        """Product with a dense (n_genes, d) matrix, differentiable in the latter only, (n_cells, d)."""
        rows = self.rows if dense.requires_grad and torch.is_grad_enabled() else None
        return _SparseMatmul.apply(self.values, self.genes, self.offsets, rows, dense)

    def to_dense(self) -> Tensor:
        """Dense (n_cells, n_genes) matrix."""
        dense = self.values.new_zeros(self.n_cells, self.n_genes)
        dense[self.rows, self.genes] = self.values
        return dense


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the values between one offset and the next, (n_offsets - 1,)."""
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)


class _SparseMatmul(torch.autograd.Function):
    """CSR times dense as weighted bags of rows, in float32; no gradient for the counts.

    Both passes are bags (of genes of a cell, then of cells of a gene). torch's kernel for them reads whole rows of the
    table in order and has no atomic adds, several times as fast as its product of a CSR matrix, and the same numbers at
    each call.
    """

    @staticmethod
    def forward(ctx, values: Tensor, genes: Tensor, offsets: Tensor, rows: Tensor | None, dense: Tensor) -> Tensor:
        values = values.float()
        if rows is not None:
            # now, since the memory that a sort takes is least missed before there are any gradients
            ctx.save_for_backward(*_by_gene(values, genes, rows, dense.shape[0]))
        ctx.dtype = dense.dtype
        with torch.autocast(dense.device.type, enabled=False):
            return _weighted_bags(values, genes, offsets, dense.float())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        weights, rows, gene_offsets = ctx.saved_tensors
        with torch.autocast(grad_output.device.type, enabled=False):
            grad = _weighted_bags(weights, rows, gene_offsets, grad_output.float())
        return None, None, None, None, grad.to(ctx.dtype)


def _by_gene(values: Tensor, genes: Tensor, rows: Tensor, n_genes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and rows in the order of their genes, and where each gene begins, (n_genes + 1,)."""
    # a sort takes time by the bytes of its keys
    keys, order = genes.to(torch.int16 if n_genes < 1 << 15 else torch.int32).sort(stable=True)
    bounds = torch.arange(n_genes + 1, dtype=keys.dtype, device=keys.device)
    offsets = torch.searchsorted(keys, bounds).to(rows.dtype)
    return values.index_select(0, order), rows.index_select(0, order), offsets


def _weighted_bags(weights: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Sum of the rows of ``table`` at ``index``, times ``weights``, between offsets, (n_bags, d).

    On a CPU, a table larger than its cache is taken some columns at a time: the same numbers, more than twice as fast.
    """

    def bags(columns: Tensor) -> Tensor:
        return F.embedding_bag(
            index, columns.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    width = max(64, CACHE_ENTRIES // max(table.shape[0], 1) // 64 * 64)
    if table.device.type != "cpu" or table.shape[1] <= width:
        return bags(table)
    total = table.new_empty(offsets.shape[0] - 1, table.shape[1])
    for columns, place in zip(table.split(width, dim=1), total.split(width, dim=1), strict=True):
        place.copy_(bags(columns))
    return total
