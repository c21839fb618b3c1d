"""Published task heads on z."""

from __future__ import annotations

from torch import Tensor, nn

from ._config import PublishedConfig


class AnnotationHead(nn.Module):
    """Cell-type classifier: dropout and linear layers with ReLU between them."""

    def __init__(self, config: PublishedConfig):
        super().__init__()
        widths = [config.n_latent, *[config.n_decoder_hidden] * (config.n_decoder_layers - 1), config.n_outputs]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, z: Tensor) -> Tensor:
        """Logits of the classes, (n_cells, n_latent) -> (n_cells, n_classes)."""
        for n, layer in enumerate(self.layers):
            z = layer(self.dropout(z if n == 0 else z.relu()))
        return z
