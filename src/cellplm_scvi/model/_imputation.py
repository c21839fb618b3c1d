"""Expression of genes that a cell's data set did not measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import AnnOrMuData
from cellplm_scvi.data._checks import as_names, check_library_size, check_sizes, counted, some, warn
from cellplm_scvi.data._table import CellTable
from cellplm_scvi.data._vocabulary import gene_columns
from cellplm_scvi.model._embedding import fixed_draws
from cellplm_scvi.nn import BatchAwareDecoder

from ._panel_regression import PanelRegression, blend, centred, fit_panel_regressions

if TYPE_CHECKING:
    from cellplm_scvi.module import CellPLMModule


class ImputationMixin:
    """Decodes every gene of the model for every cell."""

    module: CellPLMModule

    @torch.inference_mode()
    def get_imputed_expression(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        return_std: bool = False,
        batch_size: int | None = None,
        regression_weight: float = 0.7,
    ) -> pd.DataFrame | tuple[pd.DataFrame, pd.DataFrame]:
        r"""Expected expression of each gene, also of those that the cell's data set did not measure.

        A gene that was measured is decoded as :meth:`get_normalized_expression` does it. One that was not is decoded as if
        the cell came from the data sets that did measure it, with the batches and platforms of their cells, because the
        codes of its own data set have never learned that gene. Its scale follows from the genes that both measured:

        .. math::
            \rho_{ng} = \sum_{g' \in M_n \cap M_r} \rho_{ng'} \cdot
                \frac{\exp(\ell^{(r)}_{ng})}{\sum_{g' \in M_n \cap M_r} \exp(\ell^{(r)}_{ng'})}, \qquad g \notin M_n

        with :math:`M_n` the genes of the cell's own panel, :math:`M_r` those of the other data set, and
        :math:`\ell^{(r)}` the logits decoded as if in it; several data sets are averaged. So the measured genes of a cell
        add up to ``library_size``, and the others are in the same unit. Genes that no data set of the model's AnnData
        measured, whether or not it has columns for them, and that the model learned from other data before it was loaded,
        are decoded with the mean contribution of the covariates.

        The embedding keeps of a cell what it can learn to keep. The rest of what the measured genes say is added by a ridge
        regression of log expression on the genes that both measured, fitted to the cells of the other data set in the model's
        AnnData (in ``adata``, if the model was loaded without): the log of what is returned lies between both, see
        ``regression_weight``. It is about genes standardised in each data set, so that what it adds to a cell depends on which
        other cells of its data set are in ``adata``, though not on ``indices``. Cells with positions are embedded
        without them for genes that only cells without positions teach, as these are.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_normalized_expression`.
        gene_list
            Genes of the model to return, in this order; ``None`` is all of them.
        library_size
            Counts that the measured genes of a cell add up to, with genes that ``size_factor_key`` alone counts if there are such;
            ``"latent"`` is the cell's own library.
        n_samples
            1 decodes the mean of q(z|h); more average over draws.
        return_std
            Also return the standard deviation of the expectation over draws of z (25, unless ``n_samples`` is larger
            than 1; these draws depend on ``indices`` and ``batch_size``). It says how well the cell's state is known, and is zero with ``latent="deterministic"``; how well a
            gene is predicted by that state is another matter, see :meth:`get_imputation_reliability`.
        regression_weight
            Weight of the regression, from 0 (what the model decodes) to 1, for genes that were not measured.

        Returns
        -------
        (n_cells, n_genes), or two of them with ``return_std``, rows named by ``obs_names``.

        Raises
        ------
        ValueError
            If ``gene_list`` names a gene that the model does not know, or the weight is not within 0 and 1.
        """
        if not isinstance(regression_weight, Real) or not 0 <= regression_weight <= 1:
            raise ValueError(f"regression_weight={regression_weight!r} must be from 0 to 1.")
        check_sizes(n_samples=n_samples)
        check_library_size(library_size)
        self._check_if_trained(warn=False)  # type: ignore[attr-defined]
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        columns, names = self._vocabulary(gene_list)
        rows = self._rows(adata.obs_names, indices)  # type: ignore[attr-defined]
        if return_std and n_samples == 1:
            n_samples = 25
        table = self._table(adata)  # type: ignore[attr-defined]
        teachers = None if table.measured is None else self._teachers(table)
        profiles = [] if teachers is None else self._panel_profiles(teachers)
        regressions: list[PanelRegression] = []
        if regression_weight > 0 and teachers is not None:
            regressions = fit_panel_regressions(table, teachers, columns)

        asked = _Asked(rows, columns, n_samples, library_size, batch_size, regression_weight)
        lacking = np.zeros((rows.size, columns.size), dtype=bool)
        if table.measured is not None and table.panel is not None:
            lacking = ~table.measured[table.panel[rows]][:, columns]
        placeless = np.zeros_like(lacking)
        if teachers is not None:
            placeless = lacking & self._taught_without_positions(table, teachers)[columns]
        # regressions change nothing but what was not measured
        needed = regressions if (lacking & ~placeless).any() else []
        mean, deviation = self._imputed_rows(adata, asked, profiles, needed)
        if placeless.any():
            alone = self._imputed_rows(adata, asked, profiles, regressions, positions=False)
            mean, deviation = (np.where(placeless, *both) for both in zip(alone, (mean, deviation), strict=True))
        _say_untaught(lacking, np.isnan(mean), teachers, columns, names, regression_weight)
        index = adata.obs_names[rows]
        frames = [pd.DataFrame(values, index=index, columns=names) for values in (mean, deviation)]
        return (frames[0], frames[1]) if return_std else frames[0]

    def _imputed_rows(
        self,
        adata: AnnOrMuData,
        asked: _Asked,
        profiles: list[PanelProfile],
        regressions: list[PanelRegression],
        *,
        positions: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over draws of what is asked for, each (n_rows, n_columns)."""
        table, weight = self._table(adata), asked.regression_weight  # type: ignore[attr-defined]

        def decoded(rows: np.ndarray, n_samples: int) -> Iterator[tuple[np.ndarray, Tensor, list[Tensor]]]:
            done = 0
            for tensors in self._make_data_loader(adata, rows, asked.batch_size):  # type: ignore[attr-defined]
                outputs = self.module.inference(tensors, n_samples=n_samples)
                z = outputs["qzm"][None] if n_samples == 1 else outputs["z"]
                inputs = self.module._get_generative_input(tensors, outputs)
                here = rows[done : done + z.shape[1]]
                done += z.shape[1]
                yield here, outputs["library"], [self._imputed(draw, inputs, profiles) for draw in z]

        n_columns = asked.columns.size
        means, deviations = [np.zeros((0, n_columns), np.float32)], [np.zeros((0, n_columns), np.float32)]
        # means of regressions are those of all cells, whatever `indices` asks for
        once = bool(regressions) or not positions
        with fixed_draws(), self._encoded_once(adata, positions=positions) if once else nullcontext():  # type: ignore[attr-defined]
            regressions = centred(regressions, table, lambda rows: [draws[0] for _, _, draws in decoded(rows, 1)])
            for here, library, draws in decoded(asked.rows, asked.n_samples):
                if regressions:
                    counts, panel = table.counts[here], table.panel[here]
                    draws = [blend(shares, counts, panel, regressions, weight) for shares in draws]
                values = torch.stack([shares[:, asked.columns] for shares in draws])
                values = values * (library[:, None] if asked.library_size == "latent" else asked.library_size)
                means.append(values.mean(0).cpu().numpy())
                deviations.append(values.std(0, correction=0).cpu().numpy())
        return np.concatenate(means), np.concatenate(deviations)

    def _taught_without_positions(self, table: CellTable, own: CellTable) -> np.ndarray:
        """Genes that cells of the model teach, but none with a position, (n_genes,); none if no cell here has one."""
        measured: np.ndarray = own.measured  # type: ignore[assignment]
        unused = not self._spatial_inputs.n_neighbours or own.coordinates is None  # type: ignore[attr-defined]
        if unused or table.coordinates is None or not np.isfinite(table.coordinates).any():
            return np.zeros(measured.shape[1], dtype=bool)
        placed = np.unique(own.panel[np.isfinite(own.coordinates).all(1)])  # type: ignore[index, arg-type]
        return measured.any(0) & ~measured[placed].any(0)

    def get_imputation_reliability(
        self,
        dataset: str | None = None,
        held_out: float = 0.2,
        max_epochs: int | None = None,
        **train_kwargs: Any,
    ) -> pd.DataFrame:
        """Expected quality of each imputed gene, judged by genes that were measured and are held out.

        A second network like this one is trained, from which a share of the panel's genes is hidden in ``dataset``. Its
        predictions of them there are compared with the counts. For all genes, its predictions are also compared with the
        counts of the other data sets, when it is shown the panel's genes alone. A monotone regression of the former on the
        latter gives what to expect of genes that cannot be checked. All that is random follows from ``scvi.settings.seed``.

        Parameters
        ----------
        dataset
            Data set whose imputation is judged; ``None`` is the one that measured the fewest genes.
        held_out
            Share of the genes that it shares with others to hide.
        max_epochs, **train_kwargs
            Of :meth:`train`, for the second model.

        Returns
        -------
        DataFrame with a row a gene of the model: Pearson correlations over cells of log1p expression
        ``reference_correlation`` (NaN for genes that the second model was shown), ``held_out_correlation`` (NaN for genes
        that were not hidden), and ``expected_correlation``, which is the one to filter by.

        Raises
        ------
        ValueError
            If the model has no AnnData with a table of measured genes, or too few genes can be hidden.
        """
        from ._reliability import imputation_reliability

        return imputation_reliability(self, dataset, held_out, max_epochs, train_kwargs)  # type: ignore[arg-type]

    def _vocabulary(self, gene_list: Sequence[str] | None) -> tuple[np.ndarray, pd.Index]:
        """Places in the model, and names, of the genes asked for."""
        state = self.registry_["field_registries"][c.X_KEY]["state_registry"]  # type: ignore[attr-defined]
        genes = pd.Index(state["column_names"])
        if gene_list is None:
            return np.arange(len(genes)), genes
        wanted = pd.Index(as_names(gene_list))
        columns = genes.get_indexer(wanted)
        columns[columns < 0] = gene_columns(state, wanted[columns < 0])
        if (columns < 0).any():
            unknown = wanted[columns < 0]
            raise ValueError(
                f"gene_list has {counted(len(unknown), 'gene')} that the model does not know ({some(unknown)}): no "
                "data set that it was "
                "trained on measured them."
            )
        return columns, wanted

    def _teachers(self, given: CellTable) -> CellTable:
        """The cells of the model's AnnData, else those given; those that measured every gene are a panel as well."""
        own = self.adata_manager  # type: ignore[attr-defined]
        table = given if own is None or self._adopted else CellTable.from_manager(own)  # type: ignore[attr-defined]
        if table.measured is not None:
            return table
        whole = np.ones((1, table.counts.n_genes), dtype=bool)
        return replace(table, measured=whole, panel=np.zeros(table.n_cells, dtype=np.int64))

    def _panel_profiles(self, table: CellTable) -> list[PanelProfile]:
        """The data sets of the model's AnnData; the last stands for those, seen in training, of genes that none measured."""
        panels: np.ndarray = table.measured  # type: ignore[assignment]
        device, decoder = self.module.device, self.module.decoder
        # the published decoder gives absent covariates the mean of what was learned
        tables = decoder.codes.items() if isinstance(decoder, BatchAwareDecoder) else ()
        profiles = [
            PanelProfile(
                shown=torch.from_numpy(genes).to(device),
                given=torch.from_numpy(genes).to(device),
                covariates={
                    name: category_shares(table.covariates[name][table.panel == p], codes.n_categories).to(device)  # type: ignore[arg-type]
                    for name, codes in tables
                },
            )
            for p, genes in enumerate(panels)
        ]
        absent = ~panels.any(0)
        if absent.any():
            profiles.append(
                PanelProfile(
                    shown=torch.ones(absent.size, dtype=torch.bool, device=device),
                    given=torch.from_numpy(absent).to(device),
                    # the code of no category: the mean contribution
                    covariates={name: torch.full((1,), -1, device=device) for name, _ in tables},
                )
            )
        return profiles

    def _imputed(self, z: Tensor, inputs: dict[str, Any], profiles: list[PanelProfile]) -> Tensor:
        """Expected share of every gene, (n_cells, n_genes); those of measured genes add up to 1."""
        decoder = self.module.decoder
        measured, panel = inputs["measured"], inputs["panel"]
        own = decoder.output(measured).log_shares(decoder(z, inputs["covariates"]), panel).exp()
        if measured is None:
            return own
        known = measured[panel]
        total, n = torch.zeros_like(own), torch.zeros_like(own)
        for profile in profiles:
            shared = known & profile.shown
            new = ~known & profile.given & shared.any(1, keepdim=True)
            if not new.any():
                continue
            hidden = decoder(z, profile.covariates)
            logits = decoder.output().log_shares(hidden, None)
            scale = (own * shared).sum(1, keepdim=True).log() - logits.masked_fill(~shared, -torch.inf).logsumexp(
                1, True
            )
            total = total + torch.where(new, (logits + scale).exp(), 0.0)
            n = n + new
        # a gene that no data set of the model measured together with these has no value
        return torch.where(known, own, torch.where(n > 0, total / n.clamp_min(1), torch.nan))


def _say_untaught(
    lacking: np.ndarray,
    absent: np.ndarray,
    teachers: CellTable | None,
    columns: np.ndarray,
    names: pd.Index,
    weight: float,
) -> None:
    """Warn of genes, of those asked for, that no cell teaches, or none that shares a gene with the cells that lack them."""
    if teachers is None:
        return
    untaught = lacking.any(0) & ~teachers.measured[:, columns].any(0)  # type: ignore[index]
    if untaught.any() and weight > 0:
        warn(
            f"{counted(int(untaught.sum()), 'gene is', 'genes are')} measured by no cell that the model has at hand "
            f"({some(names[untaught])}): decoded alone, without a regression on other genes. Load the model with the AnnData of "
            "the reference to have both."
        )
    apart = (lacking & absent).any(0)
    if apart.any():
        warn(
            f"{counted(int(apart.sum()), 'gene is', 'genes are')} NaN ({some(names[apart])}): no data set that measured "
            "them shares a gene with the data set that lacks them."
        )


@dataclass(frozen=True)
class _Asked:
    rows: np.ndarray
    columns: np.ndarray
    n_samples: int
    library_size: float | Literal["latent"]
    batch_size: int | None
    regression_weight: float


@dataclass(frozen=True)
class PanelProfile:
    """A data set, or several, whose cells teach the model genes that others lack.

    Parameters
    ----------
    shown
        Genes that it measured, (n_genes,), which set the scale together with those of a cell.
    given
        Genes that are taken from it, (n_genes,).
    covariates
        Share of each category of each covariate among its cells, (n_categories,), or a code, (1,).
    """

    shown: Tensor
    given: Tensor
    covariates: dict[str, Tensor]


def category_shares(codes: np.ndarray, n_categories: int) -> Tensor:
    """Share of each category among cells, (n_categories,), float32; unknown categories are left out."""
    known = codes[(codes >= 0) & (codes < n_categories)]
    counts = np.bincount(known, minlength=n_categories).astype(np.float32)
    return torch.from_numpy(
        counts / counts.sum() if known.size else np.full(n_categories, 1 / n_categories, np.float32)
    )
