"""The published batch-aware decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from cellplm_scvi.nn._dropout import Dropout
from cellplm_scvi.nn._growth import add_codes, with_rows
from cellplm_scvi.nn._nb import GeneOutput

from ._config import PublishedConfig, PublishedNorm, published_norm

#: width of the layer before the genes, which the configuration does not name
N_OUTPUT_HIDDEN = 128
#: bounds of the published dispersion
DISPERSION_BOUNDS = (1e-4, 1e4)

Absent = Literal["mean", "of_sum"]


class PublishedCodes(nn.Module):
    """Contribution norm(PReLU(embedding)) of each category of one covariate.

    A code outside the table (an unseen category) gets the mean of the learned contributions.
    """

    def __init__(self, n_categories: int, n_hidden: int, norm: PublishedNorm):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_categories, n_hidden))
        self.activation = nn.PReLU()
        self.norm = published_norm(norm, n_hidden)

    def contribution(self, weight: Tensor) -> Tensor:
        """(n, n_hidden) -> (n, n_hidden)."""
        return self.norm(self.activation(weight))

    def mean(self) -> Tensor:
        """Mean contribution of the categories, (1, n_hidden)."""
        return self.contribution(self.weight).mean(0, keepdim=True)

    def of_sum(self) -> Tensor:
        """What the published code adds where a covariate is absent: the contribution of the sum of embeddings."""
        return self.contribution(self.weight.detach().sum(0, keepdim=True))

    def forward(self, codes: Tensor) -> Tensor:
        """(n_cells,) -> (n_cells, n_hidden), or (1, n_hidden) where all have the same code."""
        n = self.weight.shape[0]
        known = (codes >= 0) & (codes < n)
        # a table of thousands of batches against a minibatch of a few: each one's contribution is computed once
        used, row = torch.where(known, codes, n).unique(return_inverse=True)
        rows = self.contribution(self.weight.index_select(0, used.clamp(max=n - 1)))
        if codes.device.type != "cpu" or not bool(known.all()):  # a GPU would have to wait for the answer
            rows = torch.where((used < n)[:, None], rows, self.mean())
        return rows if rows.shape[0] == 1 else rows.index_select(0, row)


class PublishedDecoderLayer(nn.Module):
    """Linear, PReLU, dropout, norm; then the contributions of the covariates."""

    def __init__(self, n_input: int, config: PublishedConfig):
        super().__init__()
        d = config.n_decoder_hidden
        self.linear = nn.Linear(n_input, d)
        self.activation = nn.PReLU()
        self.dropout = Dropout(config.dropout_rate)
        self.norm = published_norm(config.norm, d)
        self.codes = nn.ModuleDict({name: PublishedCodes(n, d, config.norm) for name, n in config.covariates.items()})

    def before_covariates(self, x: Tensor) -> Tensor:
        """(n_cells, n_input) -> (n_cells, n_hidden)."""
        return self.norm(self.dropout(self.activation(self.linear(x))))

    def of_covariates(self, covariates: Mapping[str, Tensor], absent: Absent) -> list[Tensor]:
        """Contribution of each covariate, (n_cells or 1, n_hidden)."""
        return [
            codes(covariates[name]) if name in covariates else codes.mean() if absent == "mean" else codes.of_sum()  # type: ignore[operator]
            for name, codes in self.codes.items()
        ]


class PublishedDecoder(nn.Module):
    """Decodes z and covariates to a hidden state, and that to genes.

    Parameters
    ----------
    config
        Configuration.

    Notes
    -----
    The published mean is exp(logits), clamped to 1e-5..1e6 and rescaled to the library: the softmax over genes that
    :class:`~cellplm_scvi.nn.GeneOutput` stands for, but for the clamp.
    """

    def __init__(self, config: PublishedConfig):
        super().__init__()
        inputs = [config.n_latent] + [config.n_decoder_hidden] * (config.n_decoder_layers - 1)
        self.layers = nn.ModuleList(PublishedDecoderLayer(n, config) for n in inputs[: config.n_decoder_layers - 1])
        self.output_hidden = nn.Linear(config.n_decoder_hidden, N_OUTPUT_HIDDEN)
        self.weight = nn.Parameter(torch.randn(config.n_genes, N_OUTPUT_HIDDEN) / N_OUTPUT_HIDDEN**0.5)
        self.bias = nn.Parameter(torch.zeros(config.n_genes))
        self.log_dispersion = nn.Parameter(torch.randn(config.n_genes))

    @property
    def log_theta(self) -> Tensor:
        """Log inverse dispersion of each gene, (n_genes,)."""
        low, high = (torch.tensor(bound).log().item() for bound in DISPERSION_BOUNDS)
        return self.log_dispersion.clamp(low, high)

    @property
    def codes(self) -> dict[str, nn.Module]:
        """Covariates that the decoder knows, as the module's steps ask for them."""
        return dict(self.layers[0].codes.items()) if self.layers else {}  # type: ignore[union-attr, operator]

    @property
    def output_codes(self) -> dict[str, nn.Module]:
        """Covariates that enter right before the genes: none."""
        return {}

    def add_categories(self, covariate: str, n_known: int, n_added: int) -> None:
        """Give a covariate of ``n_known`` categories ``n_added`` more."""
        if not self.layers:
            raise ValueError("The decoder of this checkpoint has no hidden layer, and so no place for covariates.")
        for layer in self.layers:
            add_codes(layer.codes, covariate, n_known, n_added, layer.linear.out_features)  # type: ignore[arg-type, union-attr]

    def tables(self, covariate: str) -> list[nn.Module]:
        """The tables of a covariate, one a layer."""
        return [layer.codes[covariate] for layer in self.layers]  # type: ignore[union-attr, operator, index, misc]

    def surface(self) -> list[nn.Parameter]:
        """What belongs to single categories and single genes."""
        codes = [p for layer in self.layers for p in layer.codes.parameters()]  # type: ignore[union-attr, operator]
        return [*codes, self.weight, self.bias, self.log_dispersion]

    @torch.no_grad()
    def add_genes(self, bias: Tensor) -> None:
        """Add genes whose logit is ``bias``, (n_added,), whatever z is; their dispersion is that of the mean gene."""
        self.weight = with_rows(self.weight, self.weight.new_zeros(len(bias), N_OUTPUT_HIDDEN))
        self.bias = with_rows(self.bias, bias)
        self.log_dispersion = with_rows(self.log_dispersion, self.log_theta.mean().expand(len(bias)))

    def output(self, measured: Tensor | None = None) -> GeneOutput:
        """The last layer, as the likelihood takes it; ``measured`` (n_panels, n_genes) are the genes of each panel."""
        return GeneOutput(self.weight, self.bias, self.log_theta, measured)

    def layer_states(self, z: Tensor, covariates: Mapping[str, Tensor], absent: Absent = "mean") -> list[Tensor]:
        """State after each hidden layer, each (n_cells, n_hidden)."""
        states = []
        x = z
        for layer in self.layers:
            x = layer.before_covariates(x)  # type: ignore[operator]
            contributions = layer.of_covariates(covariates, absent)  # type: ignore[operator]
            x = x + sum(contributions) if contributions else x
            states.append(x)
        return states

    def forward(self, z: Tensor, covariates: Mapping[str, Tensor]) -> Tensor:
        """Hidden states before the genes.

        Parameters
        ----------
        z
            (..., n_cells, n_latent).
        covariates
            Codes of the covariates that are known, (n_cells,) each; an absent one gets the mean contribution.

        Returns
        -------
        (..., n_cells, 128)
        """
        cells = z.shape[:-1]
        repeats = cells[:-1].numel()
        flat = {name: codes.repeat(repeats) for name, codes in covariates.items()}
        states = self.layer_states(z.flatten(0, -2), flat)
        hidden = torch.relu(self.output_hidden(states[-1] if states else z.flatten(0, -2)))
        return hidden.unflatten(0, cells)
