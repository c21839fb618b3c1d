"""Counts of a minibatch in compressed sparse rows, as three plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


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
        """Cell (row) of each entry, (n_nonzero,)."""
        lengths = self.offsets[1:] - self.offsets[:-1]
        cells = torch.arange(self.n_cells, device=self.offsets.device)
        return torch.repeat_interleave(cells, lengths, output_size=self.values.shape[0])

    def with_values(self, values: Tensor) -> SparseCounts:
        """The same non-zero pattern with other values."""
        return replace(self, values=values)

    def select(self, cells: Tensor) -> SparseCounts:
        """Rows where ``cells``, (n_cells,) boolean, is true."""
        keep = cells[self.rows]
        lengths = (self.offsets[1:] - self.offsets[:-1])[cells]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return SparseCounts(self.values[keep], self.genes[keep], offsets, self.n_genes)

    def sum(self) -> Tensor:
        """Total of each cell, (n_cells,)."""
        return self.values.new_zeros(self.n_cells).index_add_(0, self.rows, self.values)

    def matmul(self, dense: Tensor) -> Tensor:
        """Product with a dense (n_genes, d) matrix, differentiable in the latter only, (n_cells, d)."""
        return _SparseMatmul.apply(self.values, self.genes, self.offsets, dense)

    def to_dense(self) -> Tensor:
        """Dense (n_cells, n_genes) matrix."""
        dense = self.values.new_zeros(self.n_cells, self.n_genes)
        dense[self.rows, self.genes] = self.values
        return dense


class _SparseMatmul(torch.autograd.Function):
    """CSR times dense; the backward pass multiplies by the transpose, without a gradient for the counts."""

    @staticmethod
    def forward(ctx, values: Tensor, genes: Tensor, offsets: Tensor, dense: Tensor) -> Tensor:
        ctx.save_for_backward(values, genes, offsets)
        ctx.n_genes = dense.shape[0]
        ctx.dtype = dense.dtype
        # sparse products have no half-precision kernel on every device
        with torch.autocast(dense.device.type, enabled=False):
            return _csr(values, genes, offsets, dense.shape[0]) @ dense.float()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        values, genes, offsets = ctx.saved_tensors
        n_cells = offsets.shape[0] - 1
        # The CSR arrays of a matrix are the CSC arrays of its transpose: no sorting is needed.
        with torch.autocast(grad_output.device.type, enabled=False):
            transposed = torch.sparse_csc_tensor(
                offsets, genes, values.float(), size=(ctx.n_genes, n_cells), check_invariants=False
            )
            grad = transposed @ grad_output.float()
        return None, None, None, grad.to(ctx.dtype)


def _csr(values: Tensor, genes: Tensor, offsets: Tensor, n_genes: int) -> Tensor:
    return torch.sparse_csr_tensor(
        offsets, genes, values.float(), size=(offsets.shape[0] - 1, n_genes), check_invariants=False
    )
