"""The published CellPLM in pure PyTorch, derived from its configuration; what it does wrong is in :mod:`_reference` alone."""

from ._config import PublishedConfig
from ._decoder import PublishedDecoder
from ._embedder import PublishedEmbedder
from ._encoder import PublishedEncoder
from ._heads import AnnotationHead
from ._latents import (
    PublishedDeterministic,
    PublishedGaussian,
    PublishedLatent,
    PublishedMixture,
    published_latent,
)
from ._network import PublishedNetwork
from ._reference import Draws, ReferenceInput, ReferencePass, reference_pass

__all__ = [
    "AnnotationHead",
    "Draws",
    "PublishedConfig",
    "PublishedDecoder",
    "PublishedDeterministic",
    "PublishedEmbedder",
    "PublishedEncoder",
    "PublishedGaussian",
    "PublishedLatent",
    "PublishedMixture",
    "PublishedNetwork",
    "ReferenceInput",
    "ReferencePass",
    "published_latent",
    "reference_pass",
]
