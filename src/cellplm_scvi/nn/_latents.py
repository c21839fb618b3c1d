"""Latent spaces: the posterior of a cell, the prior, and the divergence between them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

Latent = Literal["mixture", "gaussian", "deterministic"]

MIN_VARIANCE = 1e-4
#: largest share of the prior's variance that lies between the components of the mixture
MAX_BETWEEN = 0.25
#: bound of the log of a component's variance relative to the mean of all
MAX_LOG_RATIO = 1.5


class LatentSpace(nn.Module, ABC):
    """Posterior q(z|h), a Gaussian a cell, and a prior p(z)."""

    #: whether z is drawn (False: it is a function of the cell)
    stochastic = True

    def __init__(self, n_hidden: int, n_latent: int):
        super().__init__()
        self.mean = nn.Linear(n_hidden, n_latent)

    @abstractmethod
    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|h): h (n_cells, n_hidden) -> two of (n_cells, n_latent)."""

    def posterior_mean(self, h: Tensor) -> Tensor:
        """Mean of q(z|h) alone, for where its variance is not asked for, (n_cells, n_latent)."""
        return self.mean(h).float()

    @abstractmethod
    def divergence(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """KL divergence from the prior of each cell, (..., n_cells), in nats."""

    def sample(self, mean: Tensor, variance: Tensor, n_samples: int = 1) -> Tensor:
        """Draw z, (n_cells, n_latent), or (n_samples, n_cells, n_latent) for more than one."""
        shape = mean.shape if n_samples == 1 else (n_samples, *mean.shape)
        return mean + variance.sqrt() * torch.randn(shape, dtype=mean.dtype, device=mean.device)


class DeterministicLatent(LatentSpace):
    """z is a linear function of the cell's hidden state; there is no prior."""

    stochastic = False

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(h).float()
        return mean, torch.zeros_like(mean)

    def divergence(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return mean.new_zeros(z.shape[:-1])

    def sample(self, mean: Tensor, variance: Tensor, n_samples: int = 1) -> Tensor:
        return mean if n_samples == 1 else mean.expand(n_samples, *mean.shape)


class GaussianLatent(LatentSpace):
    r"""One Gaussian a cell, :math:`q(z|h) = N(\mu(h), \sigma^2(h))`, and a standard normal prior."""

    def __init__(self, n_hidden: int, n_latent: int):
        super().__init__(n_hidden, n_latent)
        self.raw_variance = nn.Linear(n_hidden, n_latent)

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        variance = F.softplus(self.raw_variance(h).float()) + MIN_VARIANCE
        return self.mean(h).float(), variance

    def divergence(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum(-1)
        return kl.expand(z.shape[:-1])


class MixtureLatent(GaussianLatent):
    r"""Gaussian-mixture latent space as the paper writes it (Wen et al. 2024, section 3.3).

    :math:`q(z|h)` is one Gaussian a cell and :math:`p(z) = \sum_y \pi_y N(z; m_y, s_y^2)`. The posterior of the
    component, :math:`q(y|z) = p(y|z)`, is their responsibilities, so that the two terms of the paper,
    :math:`E_{q(y|z)}[\log q(z|h) - \log p(z|y)]` and :math:`KL(q(y|z) \| \pi)`, add up to
    :math:`\log q(z|h) - \log p(z)`, which is estimated with the draw of z that the decoder sees. Both are live: means,
    variances and weights of the components get a gradient at every step where the divergence counts.

    In each dimension, the mixture as a whole has mean 0 and variance 1, at most a quarter of it between the components,
    whose variances differ by a bounded factor. A divergence costs nothing where components and cells move apart together, so that without these
    bounds the embedding falls into as many tight lumps as there are components, whatever the cell types are.
    """

    def __init__(self, n_hidden: int, n_latent: int, n_components: int):
        super().__init__(n_hidden, n_latent)
        self.raw_mean = nn.Parameter(0.1 * torch.randn(n_components, n_latent))
        self.raw_log_variance = nn.Parameter(torch.zeros(n_components, n_latent))
        self.component_logit = nn.Parameter(torch.zeros(n_components))

    @property
    def n_components(self) -> int:
        return self.component_logit.shape[0]

    def components(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each component, each (n_components, n_latent)."""
        share = self.component_logit.softmax(0)[:, None]
        centred = self.raw_mean - (share * self.raw_mean).sum(0)
        spread = (share * centred.square()).sum(0)
        between = MAX_BETWEEN * spread / (spread + 1)
        mean = centred * (MAX_BETWEEN / (spread + 1)).sqrt()
        ratio = (MAX_LOG_RATIO * torch.tanh(self.raw_log_variance / MAX_LOG_RATIO)).exp()
        return mean, (1 - between) * ratio / (share * ratio).sum(0)

    def component_log_joint(self, z: Tensor) -> Tensor:
        """Log pi_y + log N(z; m_y, s_y^2), (..., n_cells, n_components)."""
        mean, variance = self.components()
        precision = 1 / variance
        # expanded square: (z - m)^2 / s^2 without a tensor of cells x components x dimensions
        square = (
            z.square() @ precision.T - 2 * (z @ (mean * precision).T) + (mean.square() * precision).sum(1)
        ).clamp_min(0.0)
        log_norm = variance.log().sum(1) + z.shape[-1] * math.log(2 * math.pi)
        return self.component_logit.log_softmax(0) - 0.5 * (square + log_norm)

    def responsibilities(self, z: Tensor) -> Tensor:
        """q(y|z), (..., n_cells, n_components), summing to one."""
        return self.component_log_joint(z).softmax(-1)

    def divergence(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        log_q = -0.5 * ((z - mean).square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return log_q - self.component_log_joint(z).logsumexp(-1)

    @torch.no_grad()
    def set_components(self, mean: Tensor, variance: Tensor, weight: Tensor) -> None:
        """Place the components where a mixture has them, up to its scale and the bounds of :meth:`components`.

        Parameters
        ----------
        mean, variance
            Of each component, (n_components, n_latent).
        weight
            Of each component, (n_components,), summing to one.
        """
        within = (weight[:, None] * variance.clamp_min(MIN_VARIANCE)).sum(0)
        overwrite(self.raw_mean, (mean - (weight[:, None] * mean).sum(0)) / within.sqrt())
        ratio = (variance.clamp_min(MIN_VARIANCE) / within).log() / MAX_LOG_RATIO
        overwrite(self.raw_log_variance, MAX_LOG_RATIO * torch.atanh(ratio.clamp(-0.7, 0.7)))
        overwrite(self.component_logit, weight.clamp_min(1e-8).log())


def overwrite(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter the values of a whole tensor, also where the parameter is sharded over devices."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def latent_space(kind: Latent, n_hidden: int, n_latent: int, n_components: int) -> LatentSpace:
    """The latent space for a word."""
    match kind:
        case "mixture":
            return MixtureLatent(n_hidden, n_latent, n_components)
        case "gaussian":
            return GaussianLatent(n_hidden, n_latent)
        case "deterministic":
            return DeterministicLatent(n_hidden, n_latent)
