"""The parts of a published model under one root, as its configuration says."""

from __future__ import annotations

from torch import nn

from ._config import PublishedConfig
from ._decoder import PublishedDecoder
from ._embedder import PublishedEmbedder
from ._encoder import PublishedEncoder
from ._heads import AnnotationHead
from ._latents import published_latent


class PublishedNetwork(nn.Module):
    """Embedder, encoder, latent space, and decoder or head of a published model.

    Parameters
    ----------
    config
        Configuration.
    """

    def __init__(self, config: PublishedConfig):
        super().__init__()
        self.config = config
        self.embedder = PublishedEmbedder(config)
        self.encoder = PublishedEncoder(config)
        self.latent = published_latent(config)
        self.decoder = PublishedDecoder(config) if config.has_decoder else None
        self.head = AnnotationHead(config) if config.head == "annotation" else None
