"""The network in pure PyTorch: embedder, positions, encoders, latent spaces, decoder, likelihood."""

from ._alignment import BatchAlignment
from ._annotation import AnnotationHead
from ._attention import FlowAttention, LocalAttention, Neighbourhood, Packing, SoftmaxAttention
from ._decoder import BatchAwareDecoder
from ._embedder import GeneEmbedder
from ._encoders import Encoder, TransformerEncoder
from ._growth import AddedCodes
from ._latents import Latent, MixtureLatent, latent_space
from ._masking import GeneMasking, PanelMasking
from ._nb import GeneOutput, nb_expected_log1p, nb_negative_log_likelihood, softmax_nb_loss
from ._perturbation import PerturbationHead, PerturbationMark
from ._positions import Position, position_code
from ._sparse import SparseCounts

__all__ = [
    "AddedCodes",
    "AnnotationHead",
    "BatchAlignment",
    "BatchAwareDecoder",
    "Encoder",
    "FlowAttention",
    "GeneEmbedder",
    "GeneMasking",
    "GeneOutput",
    "Latent",
    "LocalAttention",
    "MixtureLatent",
    "Neighbourhood",
    "Packing",
    "PanelMasking",
    "PerturbationHead",
    "PerturbationMark",
    "Position",
    "SoftmaxAttention",
    "SparseCounts",
    "TransformerEncoder",
    "latent_space",
    "nb_expected_log1p",
    "nb_negative_log_likelihood",
    "position_code",
    "softmax_nb_loss",
]
