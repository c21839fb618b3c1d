"""Cell types from features of cells: calibrated probabilities, and how far a cell is from every class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: steps of the stored distribution of distances
N_QUANTILES = 1001


class AnnotationHead(nn.Module):
    r"""Multinomial logistic regression on the embedding and on principal components of expression.

    With standardised features f, :math:`p(c) = \mathrm{softmax}((W f + b) / T)`. The distance of a cell from a class is
    Mahalanobis', under the covariance within classes.

    Parameters
    ----------
    n_latent, n_genes, n_components, n_classes
        Sizes: of the embedding, of the expression, its principal components, and the classes.
    """

    loadings: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    weight: Tensor
    bias: Tensor
    class_mean: Tensor
    whitening: Tensor
    distances: Tensor
    target_sum: Tensor
    temperature: Tensor
    fitted: Tensor

    def __init__(self, n_latent: int, n_genes: int, n_components: int, n_classes: int):
        super().__init__()
        self.n_latent = n_latent
        n_features = n_latent + n_components
        shapes = {
            "loadings": (n_genes, n_components),
            "feature_mean": (n_features,),
            "feature_scale": (n_features,),
            "weight": (n_classes, n_features),
            "bias": (n_classes,),
            "class_mean": (n_classes, n_features),
            "whitening": (n_features, n_features),
            "distances": (N_QUANTILES,),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("target_sum", torch.tensor(1e4))
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("fitted", torch.tensor(False))
        #: shapes the embedding in fine-tuning; predictions do not use it
        self.classifier = nn.Linear(n_latent, n_classes)

    @torch.no_grad()
    def take_over(self, other: AnnotationHead) -> None:
        """Become a head of fewer genes, and perhaps components, whose further ones do not count until it is fitted again."""
        self.classifier.load_state_dict(other.classifier.state_dict())
        self.feature_scale.fill_(1.0)
        for name, values in other.named_buffers():
            getattr(self, name)[tuple(map(slice, values.shape))] = values

    @property
    def n_classes(self) -> int:
        return self.bias.shape[0]

    def features(self, z: Tensor, components: Tensor) -> Tensor:
        """Standardised features, (n_cells, n_latent + n_components)."""
        return (torch.cat([z, components], -1) - self.feature_mean) / self.feature_scale

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Calibrated log probability of each class, (n_cells, n_classes)."""
        return ((features @ self.weight.T + self.bias) / self.temperature).log_softmax(-1)

    def distance(self, features: Tensor) -> Tensor:
        """Distance from the nearest class, (n_cells,)."""
        return torch.cdist(features @ self.whitening, self.class_mean @ self.whitening).min(-1).values

    def fit_p_values(self, features: Tensor) -> Tensor:
        """Share of held-out cells of known classes that lie farther from every class than a cell, (n_cells,)."""
        below = torch.searchsorted(self.distances, self.distance(features).contiguous())
        return 1 - below / N_QUANTILES
