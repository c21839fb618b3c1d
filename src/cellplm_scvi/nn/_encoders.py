"""Encoders: what mixes the cells of a sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._attention import FlowAttention, GlobalAttention, LocalAttention, Neighbourhood, Packing, SoftmaxAttention
from ._dropout import Dropout

Encoder = Literal["flow", "softmax", "mlp"]

#: units from which on a CPU computes what is inside layers again rather than keep it
WIDE = 1024


class CellEncoder(nn.Module, ABC):
    """Maps the embeddings of the cells of packed samples to hidden states.

    ``encoder.compile(dynamic=True)`` compiles the forward pass to one graph for any sizes.
    """

    #: attention between all the cells of a sample, ``None`` for none
    attention: type[GlobalAttention] | None
    #: whether the backward pass computes the states inside a layer again instead of keeping them; ``None``: on a CPU,
    #: where layers are wide
    recompute: bool | None = None

    def run(self, layer: nn.Module, x: Tensor, *context: Packing | Neighbourhood | None) -> Tensor:
        """Output of a layer, (n_cells, n_hidden)."""
        recompute = self.recompute
        if recompute is None:
            recompute = x.device.type == "cpu" and x.shape[1] >= WIDE and not torch.compiler.is_compiling()
        if recompute and torch.is_grad_enabled():
            return checkpoint(layer, x, *context, use_reentrant=False)
        return layer(x, *context)

    def packing(self, lengths: Tensor) -> Packing:
        """The packing of samples of ``lengths`` cells, (n_samples,), with what the attention needs of it."""
        packing = Packing(lengths)
        if self.attention is not None:
            self.attention.prepare(packing)
        return packing

    @abstractmethod
    def forward(self, x: Tensor, packing: Packing, neighbourhood: Neighbourhood | None) -> Tensor:
        """(n_cells, n_hidden) -> (n_cells, n_hidden); ``neighbourhood`` is ``None`` where there are no coordinates."""


class EncoderLayer(nn.Module):
    """Pre-norm layer: global attention and local attention side by side, then a feed-forward network.

    Parameters
    ----------
    attention
        Global attention, or ``None`` (MLP).
    local
        Local attention, or ``None`` (no coordinates).
    """

    def __init__(
        self, n_hidden: int, attention: GlobalAttention | None, local: LocalAttention | None, dropout_rate: float
    ):
        super().__init__()
        self.attention = attention
        self.local = local
        self.norm_attention = nn.LayerNorm(n_hidden) if attention is not None or local is not None else None
        self.norm_feed_forward = nn.LayerNorm(n_hidden)
        self.feed_forward = nn.Sequential(
            nn.Linear(n_hidden, 2 * n_hidden),
            nn.GELU(),
            nn.Linear(2 * n_hidden, n_hidden),
            Dropout(dropout_rate),
        )

    def forward(self, x: Tensor, packing: Packing, neighbourhood: Neighbourhood | None) -> Tensor:
        """(n_cells, n_hidden) -> (n_cells, n_hidden)."""
        if self.norm_attention is not None:
            normed = self.norm_attention(x)
            if self.attention is not None:
                x = x + self.attention(normed, packing)
            if self.local is not None and neighbourhood is not None:
                x = x + self.local(normed, neighbourhood)
        return x + self.feed_forward(self.norm_feed_forward(x))


class TransformerEncoder(CellEncoder):
    """A stack of :class:`EncoderLayer` and a final norm.

    Parameters
    ----------
    kind
        Global attention: ``"flow"`` (linear), ``"softmax"`` (exact) or ``"mlp"`` (none).
    local
        Whether each layer also attends to the nearest cells.
    """

    def __init__(self, kind: Encoder, n_hidden: int, n_layers: int, n_heads: int, dropout_rate: float, *, local: bool):
        super().__init__()
        if kind not in (kinds := get_args(Encoder)):
            raise ValueError(f'kind="{kind}" is not one of {", ".join(f'"{word}"' for word in kinds)}.')
        attentions: dict[str, type[GlobalAttention]] = {"flow": FlowAttention, "softmax": SoftmaxAttention}
        self.attention = attentions.get(kind)

        def layer() -> EncoderLayer:
            attention = self.attention(n_hidden, n_heads, dropout_rate) if self.attention is not None else None
            near = LocalAttention(n_hidden, n_heads, dropout_rate) if local else None
            return EncoderLayer(n_hidden, attention, near, dropout_rate)

        self.layers = nn.ModuleList(layer() for _ in range(n_layers))
        self.norm = nn.LayerNorm(n_hidden)

    def forward(self, x: Tensor, packing: Packing, neighbourhood: Neighbourhood | None) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x, packing, neighbourhood)
        return self.norm(x)
