"""The published latent spaces behind our interface: every moment is a deterministic function of the cell."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellplm_scvi.nn._latents import LatentSpace

from ._config import PublishedConfig

#: width of the hidden layer of q(z|h, y), which the configuration does not name
N_MIXTURE_HIDDEN = 512
#: added to variances inside the published log density
DENSITY_EPS = 1e-8
#: bounds of the published log variance, and what is added to the variance
LOG_VARIANCE_BOUND, VARIANCE_EPS = 5.0, 1e-4
MIN_VARIANCE = 1e-8


class PublishedLatent(LatentSpace):
    """A published latent space."""

    @abstractmethod
    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]: ...


class PublishedDeterministic(PublishedLatent):
    """``latent_mod="ae"``: z is a linear function of the cell's hidden state."""

    stochastic = False

    def __init__(self, config: PublishedConfig):
        super().__init__(config.n_hidden, config.n_latent)

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(h).float()
        return mean, torch.zeros_like(mean)

    def divergence(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return mean.new_zeros(z.shape[:-1])

    def sample(self, mean: Tensor, variance: Tensor, n_samples: int = 1) -> Tensor:
        return mean if n_samples == 1 else mean.expand(n_samples, *mean.shape)


class PublishedGaussian(PublishedLatent):
    """``latent_mod="vae"``: one Gaussian a cell, standard normal prior."""

    def __init__(self, config: PublishedConfig):
        super().__init__(config.n_hidden, config.n_latent)
        self.log_variance = nn.Linear(config.n_hidden, config.n_latent)

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        log_variance = self.log_variance(h).float().clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        return self.mean(h).float(), log_variance.exp() + VARIANCE_EPS

    def divergence(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum(-1)
        return kl.expand(z.shape[:-1])


class PublishedMixture(PublishedLatent):
    r"""``latent_mod="gmvae"``: q(y|h), q(z|h, y) and p(z|y), with 1/K for p(y).

    The published code draws y and returns the mean of q(z|h, y), so that two calls differ. Here the posterior of a cell is
    the Gaussian with the moments of :math:`\sum_y q(y|h)\,q(z|h, y)`: its mean is the expectation of what the published
    code returns. In training y is drawn as published, softly (Gumbel-softmax of temperature 1), for one component costs
    a K-th of all of them, and :math:`E_y[\log q(z|h, y) - \log p(z)]` still bounds the divergence from above.
    """

    def __init__(self, config: PublishedConfig):
        super().__init__(N_MIXTURE_HIDDEN, config.n_latent)
        self.n_components = config.n_components
        self.logits = nn.Linear(config.n_hidden, config.n_components)
        self.hidden = nn.Linear(config.n_hidden + config.n_components, N_MIXTURE_HIDDEN)
        self.raw_variance = nn.Linear(N_MIXTURE_HIDDEN, config.n_latent)
        self.prior_mean = nn.Linear(config.n_components, config.n_latent)
        self.prior_raw_variance = nn.Linear(config.n_components, config.n_latent)

    def given_component(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|h, y) for y on the simplex, (n_cells, n_components) -> two of (n_cells, n_latent)."""
        hidden = torch.relu(self.hidden(torch.cat([h, y], 1)))
        return self.mean(hidden), F.softplus(self.raw_variance(hidden))

    def prior(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(z|y), (..., n_components) -> two of (..., n_latent)."""
        return self.prior_mean(y), F.softplus(self.prior_raw_variance(y))

    def _by_component(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(y|h), and what the hidden layer of q(z|h, y) adds up from the cell and from each component."""
        share = self.logits(h).float().softmax(-1)
        weight = self.hidden.weight
        return share, F.linear(h, weight[:, : h.shape[1]], self.hidden.bias), weight[:, h.shape[1] :].T

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            y = F.gumbel_softmax(self.logits(h).float())
            mean, variance = self.given_component(h, y.to(h.dtype))
            return mean.float(), variance.float().clamp_min(MIN_VARIANCE)
        share, from_cell, from_component = self._by_component(h)
        moments = torch.cat([self.mean.weight, self.raw_variance.weight])
        bias = torch.cat([self.mean.bias, self.raw_variance.bias])
        mean = torch.zeros(h.shape[0], self.mean.out_features, device=h.device)
        square = torch.zeros_like(mean)
        for k in range(self.n_components):
            given = F.linear(torch.relu(from_cell + from_component[k]), moments, bias).float()
            mean_k, raw_variance_k = given.chunk(2, 1)
            share_k = share[:, k, None]
            mean = torch.addcmul(mean, share_k, mean_k)
            square = torch.addcmul(square, share_k, F.softplus(raw_variance_k) + mean_k.square())
        return mean, (square - mean.square()).clamp_min(MIN_VARIANCE)

    def posterior_mean(self, h: Tensor) -> Tensor:
        # linear in the hidden states, so that they are averaged first: one product instead of one a component
        share, from_cell, from_component = self._by_component(h)
        hidden = torch.zeros_like(from_cell, dtype=torch.float32)
        for k in range(self.n_components):
            hidden = torch.addcmul(hidden, share[:, k, None], torch.relu(from_cell + from_component[k]).float())
        return self.mean(hidden.to(h.dtype)).float()

    def component_log_joint(self, z: Tensor) -> Tensor:
        """Log p(y) + log p(z|y), (..., n_cells, n_components)."""
        components = torch.eye(self.n_components, device=z.device, dtype=z.dtype)
        mean, variance = self.prior(components)
        precision = 1.0 / (variance + DENSITY_EPS)
        # expanded square: (z - m)^2 / s^2 without a tensor of cells x components x dimensions
        square = (
            z.square() @ precision.T - 2 * (z @ (mean * precision).T) + (mean.square() * precision).sum(1)
        ).clamp_min(0.0)
        log_norm = z.shape[-1] * math.log(2 * math.pi) - precision.log().sum(1)
        return -math.log(self.n_components) - 0.5 * (square + log_norm)

    def responsibilities(self, z: Tensor) -> Tensor:
        """q(y|z), (..., n_cells, n_components), summing to one."""
        return self.component_log_joint(z).softmax(-1)

    def divergence(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        log_q = -0.5 * ((z - mean).square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return log_q - self.component_log_joint(z).logsumexp(-1)


def published_latent(config: PublishedConfig) -> PublishedLatent:
    """The latent space of a configuration."""
    match config.latent:
        case "gmvae":
            return PublishedMixture(config)
        case "vae":
            return PublishedGaussian(config)
        case "ae":
            return PublishedDeterministic(config)
