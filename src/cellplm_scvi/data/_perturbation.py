"""Sets of control cells paired with sets of perturbed cells, and the change between them with its noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellplm_scvi import _constants as c

from ._categories import are_controls, parts_of
from ._checks import CHUNK_ROWS, warn
from ._table import CellTable

#: added to observed and expected counts, so that a gene without counts has a log change
PSEUDOCOUNT = 0.5
#: fewest perturbations of a control set from which its own sampling error can be told
MIN_SHARED = 5
#: variance of log changes from gene to gene, beside that of sampling, in their median
OWN_VARIANCE = 0.1
#: variance of the log change of a gene that a set did not measure
UNMEASURED = 1e6


def elements_of(perturbation: str, control: str) -> tuple[str, ...]:
    """Names of what is perturbed: ``"A+B"`` is A and B, in alphabetical order, ``"A+control"`` is A, and ``"control"`` nothing."""
    if are_controls(np.array([perturbation], dtype=object), control)[0]:
        return ()
    names = parts_of(perturbation)
    if "" in names:
        raise ValueError(f'"{perturbation}" is not the name of a perturbation, such as "A", or "A+B" for a pair.')
    return tuple(sorted(names - {control}))


@dataclass(frozen=True)
class ControlPairs:
    """Sets of perturbed cells, each with the set of control cells that it is compared with.

    Parameters
    ----------
    perturbations
        Elements of the perturbation of each pair.
    context
        Index of each pair's set of control cells, (n_pairs,).
    perturbed
        Rows of the perturbed cells of each pair.
    controls
        Rows of the control cells of each context.
    """

    perturbations: list[tuple[str, ...]]
    context: np.ndarray
    perturbed: list[np.ndarray]
    controls: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.perturbations)


def pair_with_controls(table: CellTable, names: np.ndarray, control: str) -> ControlPairs:
    """Pair the cells of each perturbation with control cells of the same batch and cell type.

    Where a batch has no control cell of the type, those of the type in all batches are taken, else all.

    Parameters
    ----------
    table
        Cells; labels count where they are registered.
    names
        Perturbation of each cell, (n_cells,).
    control
        Name of none.
    """
    kinds, kind = np.unique(names, return_inverse=True)
    elements = [elements_of(name, control) for name in kinds]
    is_control = are_controls(kinds, control)[kind]
    batch = table.covariates[c.BATCH_KEY]
    label = table.annotations.get(c.LABELS_KEY, np.zeros_like(batch))
    found: dict[tuple[int, ...], int] = {}
    controls: list[np.ndarray] = []

    def context(b: int, t: int) -> int:
        choices = [((b, t), (batch == b) & (label == t)), ((t,), label == t), ((), np.ones_like(is_control))]
        for key, cells in choices:
            if key in found:
                return found[key]
            rows = np.flatnonzero(is_control & cells)
            if rows.size:
                found[key] = len(controls)
                controls.append(rows)
                return found[key]
        raise ValueError("There is no control cell.")

    perturbed = np.flatnonzero(~is_control)
    by_set: dict[tuple, list[int]] = {}
    for row in perturbed.tolist():
        by_set.setdefault((elements[kind[row]], batch[row], label[row]), []).append(row)
    keys = sorted(by_set, key=str)
    contexts = np.array([context(b, t) for _, b, t in keys], dtype=np.int64)
    exact = {k for k in found if len(k) == 2}
    elsewhere = sum((b, t) not in exact for _, b, t in keys)
    if elsewhere:
        warn(
            f"{elsewhere:,} of {len(keys):,} sets of perturbed cells have no control cell of their batch and label: they "
            "are compared with those of other batches, whose effect is then taken for that of the perturbation."
        )
    return ControlPairs([key[0] for key in keys], contexts, [np.array(by_set[key]) for key in keys], controls)


@dataclass(frozen=True)
class Changes:
    """Observed log changes of the shares of genes, and their sampling variance, each (n_pairs, n_genes)."""

    change: np.ndarray
    variance: np.ndarray


def observed_changes(table: CellTable, pairs: ControlPairs) -> Changes:
    r"""Log ratio of the counts of each perturbed set to what its control set leads to expect.

    With counts :math:`y` and :math:`y_0` of the sets, libraries :math:`L` and :math:`L_0`, :math:`E = L y_0 / L_0`, and the
    overdispersion :math:`\phi_g` of control cells (variance over mean of counts at given library), the change is
    :math:`\log((y + a) / (E + a))` with :math:`a = \max(1, L / L_0) / 2`, half a count of the smaller set, and its variance
    :math:`\phi_g (1/(y + 1/2) + 1/(y_0 + 1/2))`.

    The second part is an error that all perturbations compared with one control set share. It looks like an effect that they
    have in common, and is taken off as far as it is likely not to be one, see :func:`_without_shared_error`.
    """
    library = table.totals if table.size_factor is None else table.size_factor.astype(np.float64)
    base = [_totals(table, rows) for rows in pairs.controls]
    phi = _overdispersion(table, pairs.controls, base, library)
    change = np.zeros((len(pairs), table.counts.n_genes))
    variance = np.zeros_like(change)
    for i, (rows, context) in enumerate(zip(pairs.perturbed, pairs.context, strict=True)):
        y, y0 = _totals(table, rows), base[context]
        ratio = library[rows].sum() / max(library[pairs.controls[context]].sum(), 1e-8)
        added = PSEUDOCOUNT * max(1.0, ratio)
        change[i] = np.log((y + added) / (ratio * y0 + added))
        variance[i] = phi * (1 / (y + PSEUDOCOUNT) + 1 / (y0 + PSEUDOCOUNT))
        if table.measured is not None and table.panel is not None:
            panels = np.unique(table.panel[np.concatenate([rows, pairs.controls[context]])])
            absent = ~table.measured[panels].all(0)
            change[i, absent], variance[i, absent] = 0.0, UNMEASURED
        change[i] -= _typical(change[i], variance[i])
    for context, total in enumerate(base):
        here = np.flatnonzero(pairs.context == context)
        if here.size >= MIN_SHARED:
            change[here], variance[here] = _without_shared_error(
                change[here], variance[here], phi / (total + PSEUDOCOUNT)
            )
    return Changes(change, variance)


def _typical(change: np.ndarray, variance: np.ndarray) -> float:
    """Median over genes of a change, weighted by precision.

    A gene that takes over the library lowers the shares of all others. With this taken off, they have not changed, changes
    of several perturbations may be added, and the sum of shares to 1 brings the fall back.
    """
    order = np.argsort(change)
    # no gene counts for many others, however many its counts are: each may change by itself
    weight = np.cumsum(1 / (variance[order] + OWN_VARIANCE))
    return float(change[order][np.searchsorted(weight, weight[-1] / 2)])


def _without_shared_error(
    change: np.ndarray, variance: np.ndarray, of_controls: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Changes by perturbations compared with one control set, less what its sampling error is likely to be.

    The median :math:`m_g` over :math:`n` perturbations has the variance :math:`v_g` of the controls, :math:`s_g` of about
    :math:`\pi / 2n` times the mean variance of the perturbed sets, and :math:`\tau^2` of a true change that most
    perturbations share, which is estimated over genes. The error is expected to be :math:`m_g v_g / (v_g + s_g + \tau^2)`.

    Parameters
    ----------
    change, variance
        (n_perturbations, n_genes).
    of_controls
        :math:`v_g`, (n_genes,).
    """
    measured = (variance < UNMEASURED).all(0)
    median = np.median(change, axis=0)
    sampling = of_controls + np.pi / 2 * (variance - of_controls).mean(0) / change.shape[0]
    candidates = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 30)])[:, None]
    total = sampling[measured] + candidates
    likelihood = -(np.log(total) + median[measured] ** 2 / total).sum(1)
    share = np.where(measured, of_controls / (sampling + candidates[likelihood.argmax(), 0]), 0.0)
    return change - share * median, variance - share * of_controls


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + CHUNK_ROWS] for start in range(0, rows.size, CHUNK_ROWS)]


def _totals(table: CellTable, rows: np.ndarray) -> np.ndarray:
    """Counts of each gene over cells, (n_genes,)."""
    return sum(table.counts[part].sum(0, dtype=np.float64).A1 for part in _chunks(rows))  # type: ignore[return-value]


def _overdispersion(
    table: CellTable, controls: list[np.ndarray], totals: list[np.ndarray], library: np.ndarray
) -> np.ndarray:
    """Variance over mean of the counts of control cells around their share of the library, at least 1, (n_genes,)."""
    square, mean, freedom = np.zeros(table.counts.n_genes), np.zeros(table.counts.n_genes), 0.0
    for rows, total in zip(controls, totals, strict=True):
        share = total / max(library[rows].sum(), 1e-8)
        for part in _chunks(rows):
            counts = table.counts[part]
            # sum of (x - L share)^2, without a dense matrix
            square += counts.power(2).sum(0, dtype=np.float64).A1
            square -= 2 * share * (counts.T @ library[part])
            square += (library[part] ** 2).sum() * share**2
        mean += total * max(rows.size - 1, 0) / rows.size
        freedom += max(rows.size - 1, 0)
    # a gene with few counts has no ratio of its own
    typical = square.sum() / max(mean.sum(), 1e-8)
    return np.maximum((square + 5 * typical) / (mean + 5), 1.0)
