"""The published encoder: pre-norm layers of flow attention, and the norm before the latent space."""

from __future__ import annotations

from torch import Tensor, nn

from cellplm_scvi.nn._attention import FlowAttention, Neighbourhood, Packing
from cellplm_scvi.nn._dropout import Dropout, dropout
from cellplm_scvi.nn._encoders import CellEncoder

from ._config import PublishedConfig

#: dropout inside the published attention, which the configuration does not name
ATTENTION_DROPOUT = 0.01


class PublishedAttention(FlowAttention):
    """Flow attention with the published dropout, twice after the output projection: what both keep is drawn at once."""

    def dropped(self, x: Tensor) -> Tensor:
        rate = 1 - (1 - self.dropout_rate) * (1 - ATTENTION_DROPOUT) if self.dropout_rate > 0 else 0.0
        return dropout(x, rate, self.training)


class PublishedLayer(nn.Module):
    """Attention between all cells, then a feed-forward network of twice the width."""

    def __init__(self, config: PublishedConfig):
        super().__init__()
        d, rate = config.n_hidden, config.dropout_rate
        self.attention = PublishedAttention(d, config.n_heads, rate)
        self.norm_attention = nn.LayerNorm(d)
        self.norm_feed_forward = nn.LayerNorm(d)
        self.feed_forward = nn.Sequential(
            nn.Linear(d, 2 * d), nn.GELU(), Dropout(rate), nn.Linear(2 * d, d), Dropout(rate)
        )

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(n_cells, n_hidden) -> (n_cells, n_hidden)."""
        x = x + self.attention(self.norm_attention(x), packing)
        return x + self.feed_forward(self.norm_feed_forward(x))


class PublishedEncoder(CellEncoder):
    """A stack of :class:`PublishedLayer` and a layer norm."""

    attention = PublishedAttention

    def __init__(self, config: PublishedConfig):
        super().__init__()
        self.layers = nn.ModuleList(PublishedLayer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.n_hidden)

    def forward(self, x: Tensor, packing: Packing, neighbourhood: Neighbourhood | None = None) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x, packing)
        return self.norm(x)
