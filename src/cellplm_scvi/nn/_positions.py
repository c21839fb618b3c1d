"""Positions of cells inside their sample: absolute codes, and the neighbourhoods for local attention."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

Position = Literal["local", "fourier", "sinusoidal", "none"]


class PositionCode(nn.Module, ABC):
    """Something added to the embedding of a cell that says where in its sample it lies.

    Cells without coordinates (rows of NaN) get one learned vector.
    """

    def __init__(self, n_hidden: int):
        super().__init__()
        self.no_position = nn.Parameter(torch.zeros(n_hidden))

    def forward(self, coordinates: Tensor) -> Tensor:
        """Code the coordinates.

        Parameters
        ----------
        coordinates
            (n_cells, n_dims), scaled so that the sample fits the unit square (or cube); NaN where there are none.

        Returns
        -------
        (n_cells, n_hidden)
        """
        located = torch.isfinite(coordinates).all(1, keepdim=True)
        code = self.code(coordinates.nan_to_num(0.0))
        return torch.where(located, code, self.no_position.to(code.dtype))

    @abstractmethod
    def code(self, coordinates: Tensor) -> Tensor:
        """Code finite coordinates (n_cells, n_dims) as (n_cells, n_hidden)."""


class NoCode(PositionCode):
    """No absolute position; only cells without coordinates are marked."""

    def code(self, coordinates: Tensor) -> Tensor:
        return torch.zeros_like(self.no_position).expand(coordinates.shape[0], -1)


class SinusoidalCode(PositionCode):
    """The published code: a sinusoid over a 100 x 100 grid of the field of view, half of the channels an axis.

    Wen et al. 2024, section 3.1. (Their released code computes it and then adds zero; here it enters the model.)
    """

    n_bins = 100
    table: Tensor

    def __init__(self, n_hidden: int, n_dims: int):
        super().__init__(n_hidden)
        per_axis = n_hidden // n_dims
        if per_axis < 2:
            raise ValueError(f"n_hidden={n_hidden} is too small for a sinusoidal position in {n_dims} dimensions.")
        half = per_axis // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half) * 2 / per_axis)
        angles = torch.arange(self.n_bins)[:, None] * frequencies
        table = torch.cat([angles.sin(), angles.cos()], 1)
        self.register_buffer("table", table, persistent=False)
        self.pad = n_hidden - n_dims * table.shape[1]

    def code(self, coordinates: Tensor) -> Tensor:
        bins = ((1.02 * coordinates - 0.01) * self.n_bins).floor().clamp(0, self.n_bins - 1).long()
        return nn.functional.pad(self.table[bins].flatten(1), (0, self.pad))


class FourierCode(PositionCode):
    """Random Fourier features of the coordinates through a learned map (Tancik et al. 2020).

    Parameters
    ----------
    n_frequencies
        Number of random directions.
    bandwidth
        Standard deviation of the frequencies, in cycles over the width of a sample.
    """

    frequencies: Tensor

    def __init__(self, n_hidden: int, n_dims: int, n_frequencies: int = 64, bandwidth: float = 4.0):
        super().__init__(n_hidden)
        self.register_buffer("frequencies", 2 * math.pi * bandwidth * torch.randn(n_dims, n_frequencies))
        self.project = nn.Linear(2 * n_frequencies, n_hidden)

    def code(self, coordinates: Tensor) -> Tensor:
        angles = coordinates @ self.frequencies
        return self.project(torch.cat([angles.sin(), angles.cos()], -1))


def position_code(position: Position, n_hidden: int, n_dims: int) -> PositionCode:
    """The absolute code for a word; "local" and "none" have none."""
    match position:
        case "sinusoidal":
            return SinusoidalCode(n_hidden, n_dims)
        case "fourier":
            return FourierCode(n_hidden, n_dims)
        case _:
            return NoCode(n_hidden)
