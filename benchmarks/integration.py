"""Compare integration methods on labelled data sets by scib-metrics, over several seeds.

Each (data set, method, seed) gives one JSON line with the scib-metrics scores and the wall seconds from counts to
embedding. A line that is there already is not computed again. ``--table`` prints what is on file as Markdown.

    python benchmarks/integration.py --methods pca harmony scvi scvi2 cellplm
    python benchmarks/integration.py --table
    python benchmarks/integration.py --time

``--time`` trains in turns, a few epochs of each method, and says how long all epochs take. The seconds in the lines of
scores are those of single runs, which do not compare where the machine's speed changes.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
from _common import (
    ResultFile,
    Row,
    benchmark_parser,
    markdown_table,
    read_dataset,
    seed_everything,
    timed,
    versions,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors

BATCH, LABEL, LIBRARY = "batch", "cell_type", "n_counts_all_genes"
KEY = ("dataset", "method", "seed", "kwargs")
TIME_KEY = ("dataset", "method", "repeat", "kwargs")
CONFOUNDED = ", confounded"
PACKAGES = ("scvi-tools", "scib-metrics", "harmonypy", "scanpy", "torch")


@dataclass(frozen=True)
class Task:
    """How a data set becomes an integration task.

    Parameters
    ----------
    batch_key
        Column of ``obs`` to integrate over.
    n_top_genes
        Number of highly variable genes (``seurat_v3``, on counts, within batches) that every method gets;
        ``None`` keeps all genes.
    n_cells
        Size of the subset of cells, stratified by batch and independent of the seed; ``None`` keeps all cells.
    dataset
        Data set, where it is not called like the task.
    """

    batch_key: str
    n_top_genes: int | None = None
    n_cells: int | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Options:
    """What the command line says about fitting."""

    threads: int
    accelerator: str
    size_factor: bool
    cellplm_kwargs: dict[str, Any]
    train_kwargs: dict[str, Any]


TASKS = {
    "pbmc_3chemistries_symphony": Task("batch"),
    "kang2018_ifnb_stim_ctrl": Task("condition", n_top_genes=2000),
    "kang2018_ctrl_8donors": Task("batch", n_cells=4000),
    "700 of kang2018_ifnb_stim_ctrl": Task("condition", 2000, 700, dataset="kang2018_ifnb_stim_ctrl"),
}


def load_task(folder: Path, name: str, *, confounded: bool = False) -> ad.AnnData:
    """Return the cells and genes that every method gets: counts in ``X``, ``obs[BATCH]`` and ``obs[LABEL]``.

    Where they are ``confounded``, the first and third most frequent types are in every other batch alone, beginning with the
    first, and the second and fourth in the others.
    """
    task = TASKS[name]
    adata = read_dataset(folder, task.dataset or name)
    adata.obs[BATCH] = adata.obs[task.batch_key].astype(str).astype("category")
    if task.n_top_genes is not None:
        sc.pp.highly_variable_genes(adata, n_top_genes=task.n_top_genes, flavor="seurat_v3", batch_key=BATCH)
        adata = adata[:, adata.var["highly_variable"]].copy()
    if task.n_cells is not None:
        kept, _ = train_test_split(
            np.arange(adata.n_obs), train_size=task.n_cells, stratify=adata.obs[BATCH], random_state=0
        )
        adata = adata[np.sort(kept)].copy()
    if confounded:
        batches, keep = adata.obs[BATCH].cat.categories, np.ones(adata.n_obs, dtype=bool)
        for i, label in enumerate(adata.obs[LABEL].value_counts().index[:4]):
            keep &= ((adata.obs[LABEL] != label) | adata.obs[BATCH].isin(batches[i % 2 :: 2])).to_numpy()
        adata = adata[keep].copy()
    return adata


def embed_pca(adata: ad.AnnData) -> np.ndarray:
    """Return 50 principal components ``(n_cells, 50)`` of log1p counts per 10,000."""
    normalised = ad.AnnData(adata.X.copy())
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    sc.pp.pca(normalised, n_comps=50, svd_solver="arpack", random_state=0)
    return np.asarray(normalised.obsm["X_pca"])


def embed_harmony(adata: ad.AnnData, seed: int, options: Options) -> np.ndarray:
    """Return the principal components after Harmony."""
    import harmonypy

    harmony = harmonypy.run_harmony(
        embed_pca(adata), adata.obs, BATCH, random_state=seed, ncores=options.threads, verbose=False
    )
    corrected = np.asarray(harmony.Z_corr)
    return corrected if corrected.shape[0] == adata.n_obs else corrected.T


def fit_scvi(
    adata: ad.AnnData, seed: int, options: Options, *, callbacks: Sequence[Callback] = (), **kwargs: Any
) -> Any:
    """Return an scVI, trained as it is by default."""
    import scvi

    seed_everything(seed, options.threads)
    scvi.model.SCVI.setup_anndata(adata, batch_key=BATCH)
    model = scvi.model.SCVI(adata, **kwargs)
    model.train(accelerator=options.accelerator, devices=1, enable_progress_bar=False, callbacks=list(callbacks))
    return model


def fit_cellplm(adata: ad.AnnData, seed: int, options: Options, *, callbacks: Sequence[Callback] = ()) -> Any:
    """Return a CellPLM, trained from scratch."""
    from cellplm_scvi import CellPLM

    seed_everything(seed, options.threads)
    library = LIBRARY if options.size_factor and LIBRARY in adata.obs else None
    CellPLM.setup_anndata(adata, batch_key=BATCH, size_factor_key=library)
    model = CellPLM(adata, **options.cellplm_kwargs)
    wanted = {"accelerator": options.accelerator, "devices": 1, "enable_progress_bar": False, **options.train_kwargs}
    model.train(**wanted, callbacks=list(callbacks))
    return model


FITS: dict[str, Callable[..., Any]] = {
    "scvi": fit_scvi,
    "scvi2": partial(fit_scvi, n_layers=2, n_latent=30, gene_likelihood="nb"),
    "cellplm": fit_cellplm,
}


def embed_scvi(adata: ad.AnnData, seed: int, options: Options, *, method: str) -> np.ndarray:
    """Return scVI's latent means."""
    return FITS[method](adata, seed, options).get_latent_representation()


def embed_cellplm(adata: ad.AnnData, seed: int, options: Options) -> dict[bool, np.ndarray]:
    """Return CellPLM's embedding: with its batches aligned, and as the encoder gives it (False)."""
    model = fit_cellplm(adata, seed, options)
    return {aligned: model.get_latent_representation(align_batches=aligned) for aligned in (True, False)}


METHODS: dict[str, Callable[[ad.AnnData, int, Options], np.ndarray | dict[bool, np.ndarray]]] = {
    "pca": lambda adata, seed, options: embed_pca(adata),
    "harmony": embed_harmony,
    "scvi": partial(embed_scvi, method="scvi"),
    "scvi2": partial(embed_scvi, method="scvi2"),
    "cellplm": embed_cellplm,
}
SEEDLESS = {"pca"}
TITLES = {
    "pca": "HVG + PCA",
    "harmony": "Harmony",
    "scvi": "scVI",
    "scvi2": "scVI (2 layers, 30 latent, NB)",
    "cellplm": "CellPLM",
}


def exact_neighbors(embedding: np.ndarray, n_neighbors: int) -> Any:
    """Return exact Euclidean neighbours, the cell itself first, so that scores follow from the embedding alone."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    distances, indices = NearestNeighbors(n_neighbors=n_neighbors, n_jobs=2).fit(embedding).kneighbors(embedding)
    return NeighborsResults(indices=indices, distances=distances)


def group_means(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return each cell's values replaced by the mean of its group, ``(n_cells, n_dims)``."""
    codes = np.unique(groups, return_inverse=True)[1]
    sums = np.zeros((codes.max() + 1, x.shape[1]))
    np.add.at(sums, codes, x)
    return (sums / np.bincount(codes)[:, None])[codes]


def pcr_of_composition(adata: ad.AnnData, embedding: np.ndarray, unintegrated: np.ndarray) -> float:
    """Return the PCR comparison that were left if batches agreed within each cell type, and differed in their cell types alone."""
    batch, label = adata.obs[BATCH].to_numpy(), adata.obs[LABEL].to_numpy()
    before = group_means(unintegrated, batch).var(0).sum() / unintegrated.var(0).sum()
    after = group_means(group_means(embedding, label), batch).var(0).sum() / embedding.var(0).sum()
    return float(1 - after / before)


def score(adata: ad.AnnData, embedding: np.ndarray, unintegrated: np.ndarray) -> dict[str, float]:
    """Return scib-metrics' standard set, not rescaled, with its total of 0.4 batch correction + 0.6 bio conservation.

    ``Leiden ARI`` and ``Leiden NMI`` (best of ten resolutions) and :func:`pcr_of_composition` are given as well; they are not
    part of the total.
    """
    from scib_metrics import nmi_ari_cluster_labels_leiden
    from scib_metrics.benchmark import Benchmarker

    holder = ad.AnnData(
        obs=adata.obs[[BATCH, LABEL]].copy(), obsm={"embedding": np.asarray(embedding), "before": unintegrated}
    )
    benchmarker = Benchmarker(
        holder, BATCH, LABEL, ["embedding"], pre_integrated_embedding_obsm_key="before", n_jobs=2, progress_bar=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PCR comparison score is negative")
        benchmarker.prepare(neighbor_computer=exact_neighbors)
        benchmarker.benchmark()
    scores = benchmarker.get_results(min_max_scale=False).loc["embedding"].astype(float).to_dict()
    leiden = nmi_ari_cluster_labels_leiden(exact_neighbors(embedding, 15), adata.obs[LABEL].to_numpy())
    scores |= {f"Leiden {name.upper()}": float(value) for name, value in leiden.items()}
    scores["PCR of composition"] = pcr_of_composition(adata, np.asarray(embedding, dtype=np.float64), unintegrated)
    return {name: round(value, 6) for name, value in scores.items()}


def method_kwargs(method: str, options: Options, *, aligned: bool = True) -> dict[str, Any]:
    """Return what sets a CellPLM variant apart on file; empty for the other methods and for the defaults."""
    if method != "cellplm":
        return {}
    size_factor = {"size_factor": True} if options.size_factor else {}
    alignment = {} if aligned else {"align_batches": False}
    return {**options.cellplm_kwargs, **options.train_kwargs, **size_factor, **alignment}


def run(args: argparse.Namespace, options: Options, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    for name in args.datasets:
        adata = load_task(args.data, name, confounded=args.confounded)
        unintegrated = embed_pca(adata)
        for method in args.methods:
            for seed in args.seeds[:1] if method in SEEDLESS else args.seeds:
                variant: Row = {"dataset": name + CONFOUNDED * args.confounded, "method": method, "seed": seed}
                if {**variant, "kwargs": method_kwargs(method, options)} in results:
                    continue
                found, seconds = timed(partial(METHODS[method], adata.copy(), seed, options))
                for aligned, embedding in (found if isinstance(found, dict) else {True: found}).items():
                    scores = score(adata, embedding, unintegrated)
                    row = {**variant, "kwargs": method_kwargs(method, options, aligned=aligned)}
                    row |= {"seconds": round(seconds, 2), "contended": args.contended, "threads": options.threads}
                    row |= {"accelerator": options.accelerator, "n_cells": adata.n_obs, "n_genes": adata.n_vars}
                    results.append({**row, **scores, "versions": versions(*PACKAGES)})
                    print(f"{name} {method} seed {seed}: total {scores['Total']:.3f}, {seconds:.1f} s", flush=True)


class FewEpochs(Callback):
    """Stops after some epochs, and keeps their seconds and how many epochs there would have been.

    Parameters
    ----------
    n_epochs
        Epochs to train.
    """

    def __init__(self, n_epochs: int) -> None:
        self.n_epochs, self.n_planned = n_epochs, 0
        self.starts: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the time."""
        self.n_planned = trainer.max_epochs or 0
        self.starts.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last."""
        trainer.should_stop = len(self.starts) >= self.n_epochs

    @property
    def epoch(self) -> float:
        """Seconds of an epoch, the median."""
        return float(np.median(np.diff(self.starts)))

    def seconds_of_all(self, seconds: float) -> float:
        """Return how long all epochs take, of the ``seconds`` that these and what is around them took."""
        return seconds + self.epoch * (self.n_planned - self.n_epochs)


def time_training(args: argparse.Namespace, options: Options, results: ResultFile) -> None:
    """Time trainings in turns, a few epochs each, so that what else the machine does hits all methods alike."""
    methods = [method for method in args.methods if method in FITS]
    for name in args.datasets:
        adata = load_task(args.data, name)
        for repeat in range(args.repeats + 1):  # the first warms up
            for method in methods:
                row: Row = {"dataset": name, "method": method, "repeat": repeat}
                row |= {"kwargs": method_kwargs(method, options)}
                if row in results:
                    continue
                few = FewEpochs(args.epochs)
                _, seconds = timed(partial(FITS[method], adata.copy(), repeat, options, callbacks=[few]))
                if not repeat:
                    continue
                row |= {"epochs": few.n_planned, "epoch": round(few.epoch, 4)}
                row |= {"seconds": round(few.seconds_of_all(seconds), 1), "contended": args.contended}
                row |= {"threads": options.threads, "accelerator": options.accelerator, "versions": versions(*PACKAGES)}
                results.append(row)
        print(time_table([row for row in results.rows() if row["dataset"] == name]), flush=True)


def time_table(rows: list[Row]) -> str:
    """Return the Markdown table of training times: mean ± standard deviation over repeats."""
    wanted = [{**row, "method": TITLES[row["method"]]} for row in rows]
    columns = {"epoch": ("seconds an epoch", 2), "seconds": ("seconds of all", 0)}
    return markdown_table(wanted, ("dataset", "method", "epochs"), columns, [*TASKS, *TITLES.values()])


def table(rows: list[Row], datasets: list[str]) -> str:
    """Return two Markdown tables, mean ± standard deviation over seeds: all methods by default, and variants of CellPLM."""
    columns = {
        "Total": ("total", 3),
        "Bio conservation": ("bio", 3),
        "Batch correction": ("batch correction", 3),
        "Leiden ARI": ("Leiden ARI", 3),
    }
    shown = [name + suffix for suffix in ("", CONFOUNDED) for name in datasets]
    wanted = [{**row, "method": TITLES[row["method"]]} for row in rows if row["dataset"] in shown]
    default = [row for row in wanted if not row["kwargs"] and CONFOUNDED not in row["dataset"]]
    variants = [row for row in wanted if row["kwargs"] or CONFOUNDED in row["dataset"]]
    return "\n\n".join(
        markdown_table(part, groups, columns, [*shown, *TITLES.values()])
        for part, groups in ((default, ("dataset", "method")), (variants, ("dataset", "kwargs")))
    )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser(__doc__, "integration")
    parser.add_argument("--datasets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size-factor", action="store_true", help=f"CellPLM takes obs[{LIBRARY!r}] where it is there")
    parser.add_argument("--confounded", action="store_true", help="take frequent types out of every other batch")
    parser.add_argument("--time", action="store_true", help="time trainings in turns instead, a few epochs of each")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a turn of --time")
    parser.add_argument("--repeats", type=int, default=5, help="turns of --time")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, or print the table."""
    args = parse_args()
    options = Options(args.threads, args.accelerator, args.size_factor, args.cellplm_kwargs, args.train_kwargs)
    results, times = ResultFile(args.out, KEY), ResultFile(args.out.with_name(args.out.stem + "_time"), TIME_KEY)
    if args.time:
        time_training(args, options, times)
    elif not args.table:
        logging.getLogger("scib_metrics").setLevel(logging.WARNING)
        run(args, options, results)
    print(table(results.rows(), args.datasets) + "\n\n" + time_table(times.rows()))


if __name__ == "__main__":
    main()
