"""The published network in scvi-tools' steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi.module.base import BaseModuleClass
from torch import Tensor

from cellplm_scvi.nn import GeneMasking, PanelMasking
from cellplm_scvi.nn.published import PublishedConfig, PublishedNetwork

from ._module import CellPLMModule

if TYPE_CHECKING:
    from cellplm_scvi._typing import InferenceOutputs, Minibatch


class PublishedModule(CellPLMModule):
    """Published weights behind the steps of :class:`CellPLMModule`, without the defects of the published code.

    No noise enters a result, the divergence from the mixture prior is live, masking follows the Beta distribution of the
    paper, and a covariate that is absent or unseen contributes the mean of what was learned. The input, log1p of raw
    counts, and every layer are as published, since the weights were trained with them.

    Parameters
    ----------
    config
        Configuration.
    max_context
        Most cells that see each other at inference.
    """

    def __init__(self, config: PublishedConfig, *, max_context: int = 8192):
        BaseModuleClass.__init__(self)
        self.config = config
        self.perturbation = None
        self.n_hidden = config.n_hidden
        self.max_context = max_context
        self.gene_likelihood = "nb"
        self.masking = published_masking(config)
        self.panel_masking = PanelMasking() if self.masking is not None else None
        self.register_buffer("panels", None, persistent=False)
        self.spatial = self.absolute_position = False
        self.n_neighbours = 0
        network = PublishedNetwork(config)
        self.embedder = network.embedder  # type: ignore[assignment]
        self.position = None
        self.encoder = network.encoder  # type: ignore[assignment]
        self.latent = network.latent
        self.decoder = network.decoder  # type: ignore[assignment]
        self.head = network.head
        self.niche = self.alignment = None
        self.niche_weight = 0.0

    def _get_generative_input(
        self, tensors: Minibatch, inference_outputs: InferenceOutputs, **kwargs: Any
    ) -> dict[str, Any]:
        if self.decoder is None:
            raise ValueError(
                f'This checkpoint has no decoder (head_type="{self.config.head}"): it embeds cells, but does not give '
                "expression and cannot be trained. Load a pre-training checkpoint for that."
            )

        def targets(values: Tensor) -> Tensor:
            return values[tensors["target"]] if "target" in tensors else values

        known = [name for name in self.decoder.codes if name in tensors]
        return {
            "z": inference_outputs["z"],
            "library": inference_outputs["library"],
            "covariates": {name: targets(tensors[name]) for name in known},  # type: ignore[literal-required]
            "measured": tensors.get("measured"),
            "panel": targets(tensors["panel"]) if "panel" in tensors else None,
        }


def published_masking(config: PublishedConfig) -> GeneMasking | None:
    """Masking as the published code intended it, with the mode of the rate set by the configuration."""
    if not (config.cell_mask_rate > 0 and 0 < config.gene_mask_rate <= 1):
        return None
    alpha = 5.0
    return GeneMasking(config.cell_mask_rate, alpha, 4.0 / config.gene_mask_rate + 2.0 - alpha)
