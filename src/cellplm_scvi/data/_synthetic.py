"""Synthetic tissue samples of which everything is known: types, niches, batches, panels, perturbations."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.optimize import brentq
from scipy.spatial import cKDTree

from cellplm_scvi.genes._tables import HUMAN_COLUMNS, HUMAN_FILE, _rows

from ._checks import check_sizes

GeneNames = Literal["plain", "symbol", "ensembl"]

#: column of ``obs`` whose categories have the effects of this name
KEYS = {"type": "cell_type", "batch": "batch", "platform": "platform", "perturbation": "perturbation"}
#: micrometres between neighbouring cells
SPACING = 10.0
#: cells whose types make up a cell's neighbourhood
N_NEIGHBOURS = 10
#: depth of an imaging platform relative to a dissociated one
IMAGING_DEPTH = 0.4


def synthetic_tissues(
    n_cells: int = 2000,
    n_genes: int = 200,
    n_samples: int = 4,
    *,
    n_types: int = 5,
    n_niches: int = 3,
    n_batches: int = 2,
    n_dissociated: int = 0,
    n_panel_genes: int | None = None,
    n_perturbations: int = 0,
    n_pairs: int = 0,
    perturbed_share: float = 0.6,
    rare_share: float = 0.03,
    type_effect: float = 1.0,
    niche_effect: float = 2.0,
    batch_effect: float = 0.3,
    platform_effect: float = 0.5,
    perturbation_effect: float = 2.0,
    regulator_activity: float = 0.0,
    mean_counts: float = 500.0,
    inverse_dispersion: float = 5.0,
    gene_names: GeneNames = "plain",
    seed: int | np.random.Generator = 0,
) -> AnnData:
    r"""Tissue samples with a known truth, for tests, tutorials and checks of what a model can recover.

    Each sample is a square section. Domains (niches) differ in the mix of cell types. With :math:`t_n` the type of a cell
    and :math:`c_n` the shares of the types among its 10 nearest neighbours, counts are negative binomial:

    .. math::
        \log r_{ng} &= b_g + T_{g,t_n} + (N c_n)_g + B_{g,\mathrm{batch}} + P_{g,\mathrm{platform}} + R_{g,\mathrm{perturbation}} \\
        x_{ng} &\sim \mathrm{NB}\left(\mu = \ell_n\, r_{ng} / \textstyle\sum_{g'} r_{ng'},\ \theta_g\right)

    so that a gene with a niche effect :math:`N` depends on the company of a cell, given its type.

    Perturbing a regulator (a knock-out) lowers its log rate by ``perturbation_effect``, and that change runs down a
    directed acyclic graph :math:`W` of regulators and targets: :math:`R = \delta\,(I - W)^{-1}`. Pairs add up.

    Parameters
    ----------
    n_cells, n_genes, n_samples
        Sizes; cells are spread evenly over the samples.
    n_types, n_niches, n_batches
        Numbers of cell types, of kinds of domains, and of batches; sample ``s`` is of batch ``s % n_batches``.
    n_dissociated
        The last so many samples are dissociated: their cells have no coordinates (rows of NaN), deeper counts, and another
        platform. They come from a tissue all the same, so the neighbourhood has shaped their counts.
    n_panel_genes
        Genes that the spatial samples measure; ``None`` is all. Genes outside of the panel have no counts there.
    n_perturbations, n_pairs
        Number of single perturbations, and of pairs of them.
    perturbed_share
        Share of the cells that are perturbed, if there are perturbations.
    rare_share
        Expected share of the rarest type, the last one; each type is rarer than the one before by the same factor. Where it
        is more than ``1 / n_types``, all types are equally common.
    type_effect, niche_effect, batch_effect, platform_effect
        Standard deviation of log fold changes: of all genes between types; of a third of the genes between
        neighbourhoods of a single type; of all genes between batches and between platforms.
    perturbation_effect
        Log fold change of a perturbed regulator.
    regulator_activity
        Standard deviation between cells of the log activity of each regulator, which the graph passes on to its targets as
        it does a perturbation.
    mean_counts
        Mean total of a cell of a dissociated sample over all genes; of a spatial one 0.4 of that.
    inverse_dispersion
        Mean :math:`\theta` of the genes.
    gene_names
        ``"plain"`` (gene0, gene1, ...), or approved human ``"symbol"`` or ``"ensembl"`` ids.
    seed
        A seed or a generator. The same seed gives the same data.

    Returns
    -------
    AnnData with counts in ``X`` (CSR, float32) and

    - ``obs``: ``cell_type``, ``niche``, ``sample``, ``batch``, ``platform``, ``dataset`` (``"reference"`` for dissociated
      and ``"spatial"`` for spatial samples), ``perturbation`` (``"control"``, ``"A"`` or ``"A+B"``) and ``depth``, the
      expected total over all genes;
    - ``obsm``: ``"spatial"`` in micrometres, ``"neighbour_types"`` (shares :math:`c_n`), ``"regulator_activity"``;
    - ``varm``: ``"measured_genes"`` (genes x data sets, boolean), and DataFrames of log fold changes ``"type_effects"``,
      ``"neighbour_effects"``, ``"batch_effects"``, ``"platform_effects"``, ``"perturbation_effects"``, ``"regulator_effects"``;
    - ``var``: ``base_log_rate``, ``inverse_dispersion``, ``is_niche_gene``;
    - ``uns["regulation"]``: edges ``regulator``, ``target``, ``weight``; ``uns["perturbed_genes"]``: those of each
      perturbation.

    :func:`true_shares` gives the expected shares of all genes, measured or not.

    Examples
    --------
    >>> adata = cellplm_scvi.data.synthetic_tissues(n_dissociated=2, n_panel_genes=50)
    >>> adata.varm["measured_genes"].sum()
    """
    rng = np.random.default_rng(seed)
    check_sizes(n_cells=n_cells, n_genes=n_genes, n_samples=n_samples)
    check_sizes(n_types=n_types, n_niches=n_niches, n_batches=n_batches)
    _check(n_cells, n_genes, n_samples, n_dissociated, n_panel_genes, n_perturbations, n_pairs, rare_share)
    if not 0 <= perturbed_share < 1:
        raise ValueError(f"perturbed_share={perturbed_share} is not a share: it is at least 0 and below 1.")
    scales = {"type_effect": type_effect, "niche_effect": niche_effect, "batch_effect": batch_effect}
    scales |= {"platform_effect": platform_effect, "regulator_activity": regulator_activity}
    for name, value in scales.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name}={value} is a standard deviation: it is not negative.")
    for name, value in {"mean_counts": mean_counts, "inverse_dispersion": inverse_dispersion}.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name}={value} must be a positive number.")
    genes = pd.Index(_gene_names(n_genes, gene_names, rng))
    obs, obsm, dissociated = _cells(n_cells, n_samples, n_types, n_niches, n_batches, n_dissociated, rare_share, rng)
    regulation, effects, names = _perturbations(n_genes, n_perturbations, n_pairs, perturbation_effect, genes, rng)
    perturbed = rng.random(n_cells) < (perturbed_share if n_perturbations else 0.0)
    obs["perturbation"] = np.where(perturbed, rng.integers(1, max(len(names), 2), n_cells), 0)

    is_niche_gene = rng.random(n_genes) < 1 / 3
    var = pd.DataFrame(
        {
            "base_log_rate": rng.normal(0.0, 1.0, n_genes),
            "inverse_dispersion": inverse_dispersion * rng.lognormal(-0.045, 0.3, n_genes),
            "is_niche_gene": is_niche_gene,
        },
        index=genes,
    )
    platforms = ["droplet", "imaging"]
    tables = {
        "type_effects": rng.normal(0, type_effect, (n_genes, n_types)),
        "neighbour_effects": rng.normal(0, niche_effect, (n_genes, n_types)) * is_niche_gene[:, None],
        "batch_effects": rng.normal(0, batch_effect, (n_genes, n_batches)),
        "platform_effects": rng.normal(0, platform_effect, (n_genes, 2)),
        "perturbation_effects": effects,
    }
    columns = [
        [f"type{t}" for t in range(n_types)],
        [f"type{t}" for t in range(n_types)],
        [f"batch{b}" for b in range(n_batches)],
        platforms,
        names,
    ]
    varm = {
        key: pd.DataFrame(values, index=genes, columns=names_)
        for (key, values), names_ in zip(tables.items(), columns, strict=True)
    }
    varm["measured_genes"] = _panels(genes, n_panel_genes, n_samples, n_dissociated, rng)
    obs["depth"] = mean_counts * np.where(dissociated, 1.0, IMAGING_DEPTH) * rng.lognormal(-0.08, 0.4, n_cells)
    words = {"cell_type": "type", "niche": "niche", "sample": "sample", "batch": "batch"}
    frame = pd.DataFrame(
        {key: pd.Categorical([f"{word}{code}" for code in obs[key]]) for key, word in words.items()}
        | {
            "platform": pd.Categorical(np.where(dissociated, *platforms)),
            "dataset": pd.Categorical(np.where(dissociated, "reference", "spatial")),
            "perturbation": pd.Categorical(np.asarray(names)[obs["perturbation"]]),
            "depth": obs["depth"],
        },
        index=[f"cell{n}" for n in range(n_cells)],
    )
    adata = AnnData(obs=frame, var=var)
    adata.obsm.update(obsm)
    adata.varm.update(varm)
    adata.uns["n_genes"] = n_genes
    adata.uns["regulation"] = regulation
    adata.uns["perturbed_genes"] = {name: name.split("+") for name in names[1:]}
    if regulator_activity:
        _add_activity(adata, regulator_activity, rng)
    adata.X = _counts(adata, rng)
    return adata


def true_shares(adata: AnnData) -> pd.DataFrame:
    """Expected share of every gene in a cell of :func:`~cellplm_scvi.data.synthetic_tissues`, measured or not, (n_cells, n_genes).

    Times ``obs["depth"]`` they are the means of the counts.

    Raises
    ------
    ValueError
        If these are no such tissues, or not all their genes.
    """
    if adata.uns.get("n_genes") != adata.n_vars:
        n = adata.uns.get("n_genes")
        found = f"of {n:,} genes, {adata.n_vars:,} are left" if n else "these are not"
        raise ValueError(
            f"true_shares is of what synthetic_tissues returned, whole: {found}. Take true_shares of that, and then rows and columns."
        )

    def effects(name: str) -> pd.DataFrame:
        return pd.DataFrame(adata.varm[f"{name}_effects"])

    log_rate = adata.var["base_log_rate"].to_numpy() + (
        np.asarray(adata.obsm["neighbour_types"]) @ effects("neighbour").to_numpy().T
    )
    if "regulator_activity" in adata.obsm:
        activity = pd.DataFrame(adata.obsm["regulator_activity"])
        log_rate += activity.to_numpy() @ effects("regulator")[activity.columns].to_numpy().T
    for name, key in KEYS.items():
        log_rate += effects(name)[adata.obs[key]].to_numpy().T
    rate = np.exp(log_rate)
    return pd.DataFrame(rate / rate.sum(1, keepdims=True), index=adata.obs_names, columns=adata.var_names)


def _check(
    n_cells: int,
    n_genes: int,
    n_samples: int,
    n_dissociated: int,
    n_panel_genes: int | None,
    n_perturbations: int,
    n_pairs: int,
    rare_share: float,
) -> None:
    if n_cells < n_samples:
        raise ValueError(f"n_cells={n_cells} is not a cell for each of n_samples={n_samples} samples.")
    if not 0 < rare_share <= 1:
        raise ValueError(f"rare_share={rare_share} is not a share: it is above 0 and at most 1.")
    if not 0 <= n_dissociated <= n_samples:
        raise ValueError(f"n_dissociated={n_dissociated} is not between 0 and the {n_samples} samples.")
    if n_panel_genes is not None and not 1 <= n_panel_genes <= n_genes:
        raise ValueError(f"n_panel_genes={n_panel_genes} is not between 1 and the {n_genes} genes.")
    if not 0 <= n_perturbations <= n_genes // 4:
        raise ValueError(
            f"n_perturbations={n_perturbations}: with {n_genes} genes a quarter, {n_genes // 4}, are regulators to perturb."
        )
    most = n_perturbations * (n_perturbations - 1) // 2
    if not 0 <= n_pairs <= most:
        raise ValueError(f"n_pairs={n_pairs}: {n_perturbations} perturbations make {most} pairs.")


def _gene_names(n_genes: int, kind: GeneNames, rng: np.random.Generator) -> list[str]:
    if kind == "plain":
        return [f"gene{g}" for g in range(n_genes)]
    if kind not in ("symbol", "ensembl"):
        raise ValueError(f'gene_names="{kind}" is not one of "plain", "symbol", "ensembl".')
    known = [(symbol, ensembl) for symbol, ensembl, *_ in _rows(HUMAN_FILE, HUMAN_COLUMNS) if ensembl]
    if n_genes > len(known):
        raise ValueError(f"n_genes={n_genes:,}: only {len(known):,} human genes have a symbol and an Ensembl id.")
    chosen = rng.choice(len(known), n_genes, replace=False)
    return [known[g][kind == "ensembl"] for g in chosen]


def _cells(
    n_cells: int,
    n_samples: int,
    n_types: int,
    n_niches: int,
    n_batches: int,
    n_dissociated: int,
    rare_share: float,
    rng: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray | pd.DataFrame], np.ndarray]:
    """Codes of cells, their coordinates and the types of their neighbours, and which are dissociated."""
    sample = np.sort(np.arange(n_cells) % n_samples)
    mix = _mixes(rng.gamma(0.7, 1.0, (n_niches, n_types)).clip(0.05), rare_share)
    position, niche = np.empty((n_cells, 2)), np.empty(n_cells, dtype=np.int64)
    kind, company = np.empty(n_cells, dtype=np.int64), np.zeros((n_cells, n_types))
    for s in range(n_samples):
        rows = np.flatnonzero(sample == s)
        side = SPACING * np.sqrt(rows.size)
        position[rows] = rng.uniform(0, side, (rows.size, 2))
        # domains are the Voronoi cells of three seeds a niche
        seeds = rng.uniform(0, side, (3 * n_niches, 2))
        niche[rows] = cKDTree(seeds).query(position[rows])[1] % n_niches
        draw = rng.random((rows.size, 1))
        kind[rows] = (draw > mix[niche[rows]].cumsum(1)).sum(1).clip(max=n_types - 1)
        k = min(N_NEIGHBOURS, rows.size - 1)
        if k:
            near = cKDTree(position[rows]).query(position[rows], k + 1)[1][:, 1:]
            company[rows] = np.eye(n_types)[kind[rows][near]].mean(1)
    order = rng.permutation(n_cells)  # samples are interleaved, as in real tables
    dissociated = sample >= n_samples - n_dissociated
    coordinates = np.where(dissociated[:, None], np.nan, position)
    obs = {"cell_type": kind[order], "niche": niche[order], "sample": sample[order], "batch": sample[order] % n_batches}
    shares = pd.DataFrame(
        company[order], columns=[f"type{t}" for t in range(n_types)], index=[f"cell{n}" for n in range(n_cells)]
    )
    return obs, {"spatial": coordinates[order], "neighbour_types": shares}, dissociated[order]


def _mixes(contrast: np.ndarray, rare_share: float) -> np.ndarray:
    """Share of each type in each niche, (n_niches, n_types).

    Each niche has its own mix, whose odds are those of ``contrast``; their mean is a geometric series that ends in ``rare_share``.
    """
    powers = np.arange(contrast.shape[1])

    def abundance(log_factor: float) -> np.ndarray:
        return np.exp(log_factor * powers) / np.exp(log_factor * powers).sum()

    target, mix = abundance(0.0), contrast.copy()
    if powers.size > 1 and rare_share < target[-1]:
        target = abundance(brentq(lambda x: abundance(x)[-1] - rare_share, np.log(rare_share), 0.0))
    for _ in range(200):
        mix *= target / mix.mean(0)
        mix /= mix.sum(1, keepdims=True)
    return mix


def _perturbations(
    n_genes: int, n_single: int, n_pairs: int, strength: float, genes: pd.Index, rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Edges of the regulatory graph, effects of perturbations on log rates (n_genes, n_perturbations + 1), their names."""
    n_regulators = n_genes // 4
    weights = np.zeros(
        (n_genes, n_genes)
    )  # row regulates column; regulators come first, and only later genes are targets
    for regulator in range(n_regulators):
        later = np.arange(regulator + 1, n_genes)
        targets = rng.choice(later, min(8, later.size), replace=False)
        weights[regulator, targets] = rng.normal(0, 0.4, targets.size) + rng.choice([-0.4, 0.4], targets.size)
    place = rng.permutation(n_genes)  # where in the table each of them is
    rows, columns = np.nonzero(weights)
    regulation = pd.DataFrame(
        {
            "regulator": genes[place[rows]].to_numpy(),
            "target": genes[place[columns]].to_numpy(),
            "weight": weights[rows, columns],
        }
    )
    names, changes = ["control"], [np.zeros(n_genes)]
    if n_single:
        chosen = rng.choice(n_regulators, n_single, replace=False)
        pushes = np.zeros((n_single, n_genes))
        pushes[np.arange(n_single), chosen] = -strength
        total = np.linalg.solve((np.eye(n_genes) - weights).T, pushes.T).T
        singles = np.zeros_like(total)
        singles[:, place] = total
        labels = genes[place[chosen]].to_list()
        first, second = np.triu_indices(n_single, 1)
        pairs = rng.choice(first.size, n_pairs, replace=False)
        names += labels + [f"{labels[first[p]]}+{labels[second[p]]}" for p in pairs]
        changes += [*singles, *(singles[first[p]] + singles[second[p]] for p in pairs)]
    return regulation, np.stack(changes, 1), names


def _add_activity(adata: AnnData, deviation: float, rng: np.random.Generator) -> None:
    """Activity of each regulator in each cell, and what a unit of it changes in the log rate of each gene."""
    edges = adata.uns["regulation"]
    genes = adata.var_names
    weights = np.zeros((adata.n_vars, adata.n_vars))
    weights[genes.get_indexer(edges["regulator"]), genes.get_indexer(edges["target"])] = edges["weight"]
    total = np.linalg.inv(np.eye(adata.n_vars) - weights)
    regulators = pd.unique(edges["regulator"])
    adata.varm["regulator_effects"] = pd.DataFrame(
        total[genes.get_indexer(regulators)].T, index=genes, columns=regulators
    )
    adata.obsm["regulator_activity"] = pd.DataFrame(
        rng.normal(0, deviation, (adata.n_obs, len(regulators))), index=adata.obs_names, columns=regulators
    )


def _panels(
    genes: pd.Index, n_panel_genes: int | None, n_samples: int, n_dissociated: int, rng: np.random.Generator
) -> pd.DataFrame:
    panel = np.ones(len(genes), dtype=bool)
    if n_panel_genes is not None:
        panel[rng.permutation(len(genes))[n_panel_genes:]] = False
    table = {"reference": np.ones(len(genes), dtype=bool)} if n_dissociated else {}
    table |= {"spatial": panel} if n_dissociated < n_samples else {}
    return pd.DataFrame(table, index=genes)


def _counts(adata: AnnData, rng: np.random.Generator) -> sp.csr_matrix:
    """Negative binomial counts of the measured genes."""
    mean = true_shares(adata).to_numpy() * adata.obs["depth"].to_numpy()[:, None]
    theta = adata.var["inverse_dispersion"].to_numpy()
    counts = rng.poisson(rng.gamma(theta, mean / theta))
    measured = pd.DataFrame(adata.varm["measured_genes"])[adata.obs["dataset"]].to_numpy().T
    return sp.csr_matrix(np.where(measured, counts, 0).astype(np.float32))
