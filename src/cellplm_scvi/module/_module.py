"""Wires the network into scvi-tools' steps: inference, generative, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Tensor, nn
from torch.distributions import Normal

from cellplm_scvi.nn import (
    BatchAlignment,
    BatchAwareDecoder,
    Encoder,
    GeneEmbedder,
    GeneMasking,
    Latent,
    Neighbourhood,
    PanelMasking,
    PerturbationHead,
    Position,
    SparseCounts,
    TransformerEncoder,
    latent_space,
    position_code,
    softmax_nb_loss,
)

from ._expression import ExpressionDistribution

if TYPE_CHECKING:
    from cellplm_scvi._typing import GenerativeOutputs, InferenceOutputs, Minibatch


#: batches times dimensions up to which batches are aligned, which bounds the memory of the alignment to 40 MB
MAX_ALIGNED = 65_536


class CellPLMModule(BaseModuleClass):
    """CellPLM (Wen et al. 2024): gene-expression embedder, encoder over cells, latent space, batch-aware decoder.

    Parameters
    ----------
    n_genes
        Number of genes.
    covariates
        Number of categories of each covariate of the decoder.
    n_hidden, n_layers, n_heads, n_latent, n_components, dropout_rate, encoder, latent, position
        As in :class:`~cellplm_scvi.CellPLM`.
    n_decoder_layers
        Hidden layers of the decoder.
    n_spatial_dims
        Columns of the coordinates; 0 without.
    n_neighbours
        Nearest cells for local attention.
    niche_weight
        Weight of the likelihood of the neighbourhood's counts given z, for cells with neighbours.
    masking
        How genes are hidden from the encoder in training, or ``None``.
    target_sum
        Library size to which input counts are normalised before ``log1p``; ``None`` for raw counts.
    gene_shares
        Share of each gene in all counts, (n_genes,), where the decoder starts.
    batch_fold_changes
        Log fold changes of the genes in each batch, (n_batches, n_genes), where the decoder's batch codes start.
    rest
        Whether the library size also counts genes that are not modelled.
    max_context
        Most cells that see each other at inference.
    """

    #: genes that each data set measured, (n_panels, n_genes), boolean, where they differ
    panels: Tensor | None
    #: marks of perturbed genes and what they change, once that is trained
    perturbation: PerturbationHead | None

    def __init__(
        self,
        n_genes: int,
        covariates: Mapping[str, int],
        *,
        n_hidden: int = 128,
        n_layers: int = 2,
        n_heads: int = 4,
        n_latent: int = 32,
        n_components: int = 16,
        dropout_rate: float = 0.1,
        encoder: Encoder = "flow",
        latent: Latent = "mixture",
        position: Position = "none",
        n_decoder_layers: int = 1,
        n_spatial_dims: int = 0,
        n_neighbours: int = 32,
        niche_weight: float = 0.0,
        masking: GeneMasking | None = None,
        target_sum: float | None = 1e4,
        gene_shares: Tensor | None = None,
        batch_fold_changes: Tensor | None = None,
        rest: bool = False,
        max_context: int = 8192,
    ):
        super().__init__()
        self.perturbation = None
        self.n_hidden = n_hidden
        self.max_context = max_context
        self.gene_likelihood = "nb"
        self.masking = masking
        self.panel_masking = PanelMasking() if masking is not None else None
        # of the data that it trains on, so not part of the weights; `train` sets them
        self.register_buffer("panels", None, persistent=False)
        self.spatial = n_spatial_dims > 0
        local = self.spatial and position == "local"
        self.n_neighbours = n_neighbours if local else 0
        self.absolute_position = self.spatial and position in ("fourier", "sinusoidal")
        self.embedder = GeneEmbedder(n_genes, n_hidden, target_sum, dropout_rate)
        self.position = position_code(position, n_hidden, n_spatial_dims) if self.spatial else None
        self.encoder = TransformerEncoder(encoder, n_hidden, n_layers, n_heads, dropout_rate, local=local)
        self.latent = latent_space(latent, n_hidden, n_latent, n_components)
        self.decoder = BatchAwareDecoder(
            n_latent, n_hidden, n_decoder_layers, n_genes, covariates, dropout_rate, gene_shares, rest
        )
        #: where the embedding of each batch is moved to, once that is fitted
        self.alignment = _alignment_of(covariates.get("batch", 1), n_latent)
        self.niche = (
            NicheDecoder(n_latent, n_hidden, n_genes, covariates, gene_shares) if local and niche_weight > 0 else None
        )
        if batch_fold_changes is not None and "batch" in covariates:
            self.decoder.start_codes("batch", batch_fold_changes)
            if self.niche is not None:
                self.niche.decoder.start_codes("batch", batch_fold_changes)
        self.niche_weight = niche_weight

    #: covariates that got categories last, see :meth:`add_categories`
    last_added: tuple[str, ...] = ()
    #: parts that are in evaluation mode in training too
    resting: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, but for the parts that rest."""
        super().train(mode and self not in self.resting)
        for part in self.resting:
            if part is not self:
                part.eval()
        return self

    @property
    def decoders(self) -> list[BatchAwareDecoder]:
        """The decoder of a cell's counts, and that of its neighbourhood's."""
        if self.decoder is None:
            return []
        return [self.decoder] if self.niche is None else [self.decoder, self.niche.decoder]

    def add_categories(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Give covariates of so many categories so many more, which contribute what unseen ones do."""
        for covariate, (n_known, n_added) in sizes.items():
            for decoder in self.decoders:
                decoder.add_categories(covariate, n_known, n_added)
        if "batch" in sizes:
            if self.alignment is not None:
                self.alignment.add_batches(sizes["batch"][1])
            elif (added := _alignment_of(sum(sizes["batch"]), self.latent.mean.out_features)) is not None:
                self.alignment = added.to(self.latent.mean.weight.device)
        self.last_added = tuple(sizes)

    def newest_codes(self) -> list[nn.Parameter]:
        """Contributions of the categories that were added last."""
        return [
            table.weight  # type: ignore[misc]
            for decoder in self.decoders
            for name in self.last_added
            for table in decoder.tables(name)
        ]

    def add_genes(self, biases: Sequence[Tensor]) -> None:
        """Add genes to embedder and decoders; ``biases`` has their logits in each decoder, (n_added,)."""
        self.embedder.add_genes(len(biases[0]))
        for decoder, bias in zip(self.decoders, biases, strict=True):
            decoder.add_genes(bias)

    @property
    def n_genes(self) -> int:
        return self.embedder.weight.shape[0]

    def counts(self, tensors: Minibatch) -> SparseCounts:
        """Counts of the minibatch, (n_cells, n_genes)."""
        return SparseCounts(tensors["values"], tensors["genes"], tensors["offsets"], self.n_genes)

    def hidden(self, tensors: Minibatch) -> Tensor:
        """Hidden state h of every cell of a minibatch, context included, (n_cells, n_hidden)."""
        counts, library = self.counts(tensors), tensors["library"]
        if self.training and self.panel_masking is not None and self.panels is not None:
            counts, library = self.panel_masking(counts, library, self.panels)
        if self.training and self.masking is not None:
            counts = self.masking(counts)
        packing = self.encoder.packing(tensors["lengths"])
        if "marked" in tensors and self.perturbation is not None:
            h = self.embedder(counts, library, partial(self.perturbation, tensors["marked"], packing))
        else:
            h = self.embedder(counts, library)
        neighbourhood = None
        if self.position is not None:
            h = h + self.position(self._coordinates(tensors))
            if "neighbours" in tensors:
                neighbourhood = Neighbourhood(tensors["neighbours"], tensors["distances"])
        return self.encoder(h, packing, neighbourhood)

    def encode(self, tensors: Minibatch) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|h) of every cell of a minibatch, context included, each (n_cells, n_latent)."""
        return self.latent.posterior(self.hidden(tensors))

    @auto_move_data
    def embed(self, tensors: Minibatch) -> Tensor:
        """Mean of q(z|h) of the cells that count, (n_targets, n_latent)."""
        # of the whole sample, for products over fewer cells round otherwise: `indices` must not change a bit
        mean = self.latent.posterior_mean(self.hidden(tensors))
        return mean[tensors["target"]] if "target" in tensors else mean

    def aligned(self, z: Tensor, tensors: Minibatch) -> Tensor:
        """Embeddings of the cells of a minibatch that count, (n_targets, n_latent), with their batches aligned."""
        if self.alignment is None:
            return z
        batch = tensors["batch"].to(z.device)
        return self.alignment(z, batch[tensors["target"].to(z.device)] if "target" in tensors else batch)

    def _coordinates(self, tensors: Minibatch) -> Tensor:
        """Coordinates where the position code takes them; else only whether a cell has any."""
        if "coordinates" in tensors:
            return tensors["coordinates"]
        nowhere = torch.full_like(tensors["library"][:, None], torch.nan)
        if "located" not in tensors:
            return nowhere
        return torch.where(tensors["located"][:, None], 0.0, nowhere)

    def _get_inference_input(self, tensors: Minibatch, **kwargs: Any) -> dict[str, Minibatch]:
        return {"tensors": tensors}

    @auto_move_data
    def inference(self, tensors: Minibatch, n_samples: int = 1) -> InferenceOutputs:
        """Run the encoder, unless its moments came with the minibatch.

        Returns
        -------
        Latent draws ``z`` ((n_samples,) n_targets, n_latent), the posterior and the library of the cells that count.
        """
        library = tensors["library"]
        if "qz_mean" in tensors:
            mean, variance = tensors["qz_mean"], tensors["qz_variance"]
        else:
            mean, variance = self.encode(tensors)
        if "target" in tensors:
            target = tensors["target"]
            mean, variance, library = mean[target], variance[target], library[target]
        z = self.latent.sample(mean, variance, n_samples)
        qz = Normal(mean, variance.clamp_min(1e-12).sqrt(), validate_args=False)
        return {"z": z, "qz": qz, "qzm": mean, "qzv": variance, "library": library}

    def _get_generative_input(
        self, tensors: Minibatch, inference_outputs: InferenceOutputs, **kwargs: Any
    ) -> dict[str, Any]:
        def targets(values: Tensor) -> Tensor:
            return values[tensors["target"]] if "target" in tensors else values

        # data may be set up without a covariate that the decoder knows: -1 stands for an absent category
        absent = torch.full_like(tensors["batch"], -1)
        return {
            "z": inference_outputs["z"],
            "library": inference_outputs["library"],
            "covariates": {name: targets(tensors.get(name, absent)) for name in self.decoder.codes},  # type: ignore[arg-type]
            "measured": tensors.get("measured"),
            "panel": targets(tensors["panel"]) if "panel" in tensors else None,
        }

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        covariates: dict[str, Tensor],
        measured: Tensor | None = None,
        panel: Tensor | None = None,
        transform_batch: int | None = None,
    ) -> GenerativeOutputs:
        """Decode z, (..., n_cells, n_latent), to the distribution of counts of every gene.

        ``transform_batch`` decodes as if all cells came from that batch.
        """
        if transform_batch is not None and "batch" in covariates:
            covariates = covariates | {"batch": torch.full_like(covariates["batch"], transform_batch)}
        hidden = self.decoder(z, covariates)
        output = self.decoder.output(measured)
        return {"hidden": hidden, "px": ExpressionDistribution(hidden, output, library, panel)}

    def loss(
        self,
        tensors: Minibatch,
        inference_outputs: InferenceOutputs,
        generative_outputs: GenerativeOutputs,
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Negative ELBO: NB likelihood of all measured genes, with masked input, and divergence from the prior."""
        px = generative_outputs["px"]
        counts = self.counts(tensors)
        if "target" in tensors:
            counts = counts.select(tensors["target"])
        n_cells = counts.n_cells
        weight = px.library.new_full((n_cells,), 1.0 / n_cells)
        loss, reconstruction = softmax_nb_loss(px.hidden, counts, px.library, px.output, weight, px.panel)
        divergence = self.latent.divergence(inference_outputs["z"], inference_outputs["qzm"], inference_outputs["qzv"])
        loss = loss + kl_weight * divergence.mean()
        extra = {}
        if self.niche is not None and "niche_values" in tensors:
            niche = SparseCounts(
                tensors["niche_values"], tensors["niche_genes"], tensors["niche_offsets"], self.n_genes
            )
            if "target" in tensors:
                niche = niche.select(tensors["target"])
            inputs = self._get_generative_input(tensors, inference_outputs)
            niche_loss = self.niche.loss(
                **{key: inputs[key] for key in ("z", "covariates", "measured", "panel")}, niche=niche
            )
            loss = loss + self.niche_weight * niche_loss
            extra["niche_loss"] = niche_loss.detach()
        return LossOutput(loss=loss, reconstruction_loss=reconstruction, kl_local=divergence, extra_metrics=extra)

    @torch.inference_mode()
    def sample(self, tensors: Minibatch, n_samples: int = 1, generative_kwargs: dict[str, Any] | None = None) -> Tensor:
        """Draw counts from the posterior predictive, (n_cells, n_genes(, n_samples)), on the CPU."""
        _, outputs = self.forward(
            tensors,
            inference_kwargs={"n_samples": n_samples},
            generative_kwargs=generative_kwargs,
            compute_loss=False,
        )
        draws = outputs["px"].sample()
        return (draws if n_samples == 1 else draws.permute(1, 2, 0)).cpu()


def _alignment_of(n_batches: int, n_latent: int) -> BatchAlignment | None:
    """What aligns so many batches, if there are several, and not so many that it would be too large."""
    return BatchAlignment(n_batches, n_latent) if n_batches > 1 and n_batches * n_latent <= MAX_ALIGNED else None


class NicheDecoder(nn.Module):
    """Predicts the counts of a cell's neighbourhood from its z and covariates, so that z carries where the cell lies."""

    def __init__(
        self, n_latent: int, n_hidden: int, n_genes: int, covariates: Mapping[str, int], gene_shares: Tensor | None
    ):
        super().__init__()
        self.decoder = BatchAwareDecoder(n_latent, n_hidden, 1, n_genes, covariates, gene_shares=gene_shares)

    def loss(
        self,
        z: Tensor,
        niche: SparseCounts,
        covariates: Mapping[str, Tensor],
        measured: Tensor | None = None,
        panel: Tensor | None = None,
    ) -> Tensor:
        """Mean NB loss over cells with neighbours; z (n_cells, n_latent), niche (n_cells, n_genes)."""
        total = niche.sum()
        weight = (total > 0).float()
        weight = weight / weight.sum().clamp_min(1.0)
        hidden = self.decoder(z, covariates)
        return softmax_nb_loss(hidden, niche, total, self.decoder.output(measured), weight, panel)[0]
