"""What is added to a trained network: categories of covariates, and genes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AddedCodes(nn.Module):
    """Contributions of categories that were added to a trained table; every other code is looked up in that table.

    The rows are contributions themselves, not embeddings of them: only so can they start at the mean contribution, which
    published embeddings reach through an activation and a norm, and where an unseen category is. They are a parameter of
    their own, so that they can be trained while the table stays as it is to the bit.

    Parameters
    ----------
    base
        The trained table; ``None`` where there was none, and so no contribution.
    n_known
        Number of categories before these: the code of the first added one.
    n_added
        Number of categories added.
    n_hidden
        Width of a contribution.
    """

    def __init__(self, base: nn.Module | None, n_known: int, n_added: int, n_hidden: int):
        super().__init__()
        self.base = base
        self.n_known = n_known
        start = torch.zeros(n_added, n_hidden) if base is None else base.mean().detach().repeat(n_added, 1)  # type: ignore[operator]
        self.weight = nn.Parameter(start)

    def mean(self) -> Tensor:
        """Mean contribution of the categories of the trained table alone, (1, n_hidden)."""
        return self.weight.new_zeros(1, self.weight.shape[1]) if self.base is None else self.base.mean()  # type: ignore[operator]

    @property
    def n_categories(self) -> int:
        """Number of categories, the added ones included."""
        return self.n_known + self.weight.shape[0]

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (n_cells,), or shares of the categories (n_categories,), -> (n_cells, n_hidden) or (n_hidden,)."""
        if codes.is_floating_point():
            known, added = codes.tensor_split([self.n_known])
            return added @ self.weight + (0.0 if self.base is None else self.base(known))
        row = codes - self.n_known
        is_added = (row >= 0) & (row < self.weight.shape[0])
        added = self.weight.index_select(0, row.clamp(0, self.weight.shape[0] - 1))
        # the table is always asked, for plain `ddp` wants each parameter in each step; of a known code, for that is fast
        other = torch.zeros_like(added) if self.base is None else self.base(torch.where(is_added, 0, codes))
        return torch.where(is_added[:, None], added, other)


def add_codes(tables: nn.ModuleDict, covariate: str, n_known: int, n_added: int, n_hidden: int) -> None:
    """Add categories to the table of a covariate, or make one."""
    tables[covariate] = AddedCodes(tables[covariate] if covariate in tables else None, n_known, n_added, n_hidden)


def with_rows(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    """A parameter with further rows, those that it had unchanged."""
    return nn.Parameter(torch.cat([parameter.data, rows.to(parameter)]))
