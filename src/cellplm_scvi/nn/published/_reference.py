"""One pass of the published model as it was, with its noise, floors and defects.

This is what the parity tests compare with. Nothing else calls it: :class:`~cellplm_scvi.module.PublishedModule` uses the
same parts without the defects (no noise where a result is asked for, live divergences, the mean code for absent covariates).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from cellplm_scvi.nn._attention import Packing
from cellplm_scvi.nn._sparse import SparseCounts

from . import _losses
from ._decoder import PublishedDecoder
from ._latents import PublishedGaussian, PublishedMixture
from ._network import PublishedNetwork

#: bounds of the published mean
MEAN_BOUNDS = (1e-5, 1e6)
GUMBEL_EPS, NOISE_EPS = 1e-20, 1e-10


@dataclass(frozen=True)
class Draws:
    """The noise of a pass: uniform draws for y, (n_cells, n_components), and normal ones for z, (n_cells, n_latent)."""

    uniform: Tensor
    normal: Tensor


@dataclass(frozen=True)
class ReferenceInput:
    """One sample of cells.

    Parameters
    ----------
    counts
        Counts of the input's genes, (n_cells, n_input_genes).
    genes
        Place of each of them in the model's vocabulary, (n_input_genes,); ``None``: all in order.
    mask
        Entries hidden from the encoder, (n_cells, n_input_genes), boolean; ``None``: none, and every entry counts.
    measured
        Genes of the input that count in the loss, (n_input_genes,), boolean; ``None``: all.
    covariates
        Codes, (n_cells,) each; those left out get the contribution of the sum of embeddings.
    label, labelled
        Class of each cell, and which cells have one, (n_cells,), for the annotation head.
    """

    counts: SparseCounts
    genes: Tensor | None = None
    mask: Tensor | None = None
    measured: Tensor | None = None
    covariates: Mapping[str, Tensor] = field(default_factory=dict)
    label: Tensor | None = None
    labelled: Tensor | None = None


@dataclass
class ReferencePass:
    """What a pass computed: activations by name, (n_cells, ...), and the losses."""

    activations: dict[str, Tensor]
    loss: Tensor
    latent_loss: Tensor


def reference_pass(
    network: PublishedNetwork, inputs: ReferenceInput, draws: Draws, *, train: bool = False, dae: bool | None = None
) -> ReferencePass:
    """Run the published model.

    Parameters
    ----------
    network
        Network.
    inputs
        Cells of one sample.
    draws
        Noise.
    train
        Whether y is the soft Gumbel sample and z a draw (else y is one-hot and z the mean), and the terms of training
        count. Dropout follows ``network.training``.
    dae
        Whether the masked entries count once more; ``None``: as configured, in training only.
    """
    config = network.config
    found: dict[str, Tensor] = {}
    counts = inputs.counts
    genes = torch.arange(config.n_genes) if inputs.genes is None else inputs.genes
    if inputs.mask is not None:
        keep = ~inputs.mask[counts.rows, counts.genes]
        counts = counts.with_values(counts.values * keep)
    found["feat"] = _bag(counts, network.embedder.weight[genes])
    x = found["embedder"] = network.embedder.project(found["feat"])
    packing = Packing(torch.tensor([counts.n_cells], device=x.device))
    for n, layer in enumerate(network.encoder.layers):
        x = found[f"enc{n}"] = layer(x, packing)
    h = found["prelatent"] = network.encoder.norm(x)
    z, latent_loss = _latent(network, h, draws, found, train=train)
    found["latent"] = found["z"] = z
    if network.decoder is None:
        loss = _head_loss(network, z, inputs, found)
    else:
        mean, dispersion = _decode(network.decoder, z, inputs.covariates, found)
        dae = (config.dae and train) if dae is None else dae
        loss = latent_loss + _objective(config.objective, inputs, genes, mean, dispersion, found, dae=dae)
    return ReferencePass(found, loss, latent_loss)


def _bag(counts: SparseCounts, weight: Tensor) -> Tensor:
    """Bag of genes, (n_cells, n_hidden), summed in the published order: the norm that follows may amplify rounding."""
    shape = (counts.n_cells, counts.n_genes)
    x = torch.sparse_coo_tensor(torch.stack([counts.rows, counts.genes]), torch.log1p(counts.values), shape)
    return torch.sparse.mm(x.coalesce(), weight)


def _latent(
    network: PublishedNetwork, h: Tensor, draws: Draws, found: dict[str, Tensor], *, train: bool
) -> tuple[Tensor, Tensor]:
    config, latent = network.config, network.latent
    if isinstance(latent, PublishedMixture):
        logits = latent.logits(h)
        gumbel = -torch.log(-torch.log(draws.uniform + GUMBEL_EPS) + GUMBEL_EPS)
        y = (logits + gumbel).softmax(-1)
        if not train:
            y = F.one_hot(y.argmax(-1), config.n_components).to(h.dtype)
        mean, variance = latent.given_component(h, y)
        drawn = mean + draws.normal * torch.sqrt(variance + NOISE_EPS)
        prior_mean, prior_variance = latent.prior(y)
        gaussian = _losses.log_normal(drawn, mean, variance) - _losses.log_normal(drawn, prior_mean, prior_variance)
        found |= {"gm.logits": logits, "gm.prob_cat": logits.softmax(-1), "gm.categorical": y}
        found |= {"gm.mean": mean, "gm.var": variance, "gm.gaussian": drawn}
        found |= {"gm.y_mean": prior_mean, "gm.y_var": prior_variance}
        found |= {"kl_gauss_raw": gaussian.mean(), "kl_cat_raw": _losses.categorical_divergence(logits)}
        loss = config.weight_gaussian * _losses.at_least(config.latent_floor, found["kl_gauss_raw"])
        loss = loss + config.weight_categorical * _losses.at_least(config.latent_floor, found["kl_cat_raw"])
        return (drawn if train else mean), loss
    mean, variance = latent.posterior(h)
    if isinstance(latent, PublishedGaussian) and train:
        divergence = _losses.gaussian_divergence(mean, variance)
        low = bool(divergence < _losses.GAUSSIAN_FLOOR)
        return mean + variance.sqrt() * draws.normal, divergence * 0.0 if low else divergence
    return mean, mean.new_zeros(())


def _decode(
    decoder: PublishedDecoder, z: Tensor, covariates: Mapping[str, Tensor], found: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    states = decoder.layer_states(z, covariates, absent="of_sum")
    found["dec_hidden"] = states[-1] if states else z
    hidden = torch.relu(decoder.output_hidden(found["dec_hidden"]))
    mean = F.linear(hidden, decoder.weight, decoder.bias).exp().clamp(*MEAN_BOUNDS)
    dispersion = decoder.log_theta.exp()
    found |= {"dec_mean": mean, "dec_disp": dispersion}
    return mean, dispersion.expand_as(mean)


def _objective(
    kind: str,
    inputs: ReferenceInput,
    genes: Tensor,
    mean: Tensor,
    dispersion: Tensor,
    found: dict[str, Tensor],
    *,
    dae: bool,
) -> Tensor:
    x = inputs.counts.to_dense()
    measured = torch.ones(x.shape[1], dtype=torch.bool) if inputs.measured is None else inputs.measured
    mean, dispersion = mean[:, genes], dispersion[:, genes]
    if kind == "imputation":
        loss, found["pred"] = _losses.imputation(x, mean, dispersion, measured)
        return loss
    mask = torch.ones_like(x, dtype=torch.bool) if inputs.mask is None else inputs.mask
    return _losses.reconstruction(x, mean, dispersion, mask, measured, dae=dae)


def _head_loss(network: PublishedNetwork, z: Tensor, inputs: ReferenceInput, found: dict[str, Tensor]) -> Tensor:
    if network.head is None:
        found["pred"] = z
        return z.new_zeros(())
    cells = slice(None) if inputs.labelled is None else inputs.labelled
    found["logits"] = network.head(z[cells])
    found["pred"] = found["logits"].argmax(1)
    if inputs.label is None:
        return z.new_tensor(torch.nan)
    return F.cross_entropy(found["logits"], inputs.label[cells].long())
