"""Measure how much spatial context an embedding carries, on three STARmap sections of the mouse prefrontal cortex.

A logistic regression on frozen features learns ``region`` (layer) or ``cell_type`` from two sections and is tested on
the third; the score is macro-F1, averaged over the three. CellPLM is trained without labels on all sections, for each
encoder and position. Its stability is the cosine between the embeddings of a cell before and after every section is
mirrored, rotated and shifted. Lines that are on file are not computed again; ``--table`` prints them as Markdown:
by default, and variants.

    python benchmarks/spatial.py
    python benchmarks/spatial.py --table
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
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
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

DATASET, SECTION, SPATIAL = "starmap_mouse_mpfc", "batch", "spatial"
TARGETS = ("region", "cell_type")
KEY = ("method", "seed", "kwargs")
PACKAGES = ("scvi-tools", "scanpy", "scikit-learn", "torch")
BASELINES: dict[str, tuple[int, ...]] = {"PCA": (), "PCA + mean of 15": (15,), "PCA + means of 15, 60": (15, 60)}
ENCODERS = ("flow", "softmax", "mlp")
POSITIONS = ("local", "fourier", "sinusoidal", "none")


def principal_components(adata: ad.AnnData) -> np.ndarray:
    """Return 50 principal components ``(n_cells, 50)`` of log1p counts, normalised to the median library."""
    normalised = ad.AnnData(adata.X.copy())
    sc.pp.normalize_total(normalised)
    sc.pp.log1p(normalised)
    sc.pp.pca(normalised, n_comps=50, svd_solver="arpack", random_state=0)
    return np.asarray(normalised.obsm["X_pca"])


def neighbor_means(features: np.ndarray, coordinates: np.ndarray, sections: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Return each cell's mean ``(n_cells, n_features)`` over its nearest neighbours in its section, itself left out."""
    means = np.empty_like(features)
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        neighbors = NearestNeighbors(n_neighbors=n_neighbors).fit(coordinates[rows]).kneighbors(return_distance=False)
        means[rows] = features[rows][neighbors].mean(axis=1)
    return means


def baseline_features(adata: ad.AnnData, sizes: tuple[int, ...]) -> np.ndarray:
    """Return principal components beside their means over each number of spatial neighbours."""
    components = principal_components(adata)
    means = partial(neighbor_means, components, adata.obsm[SPATIAL], adata.obs[SECTION].to_numpy())
    return np.hstack([components, *(means(size) for size in sizes)])


def leave_one_section_out(features: np.ndarray, labels: np.ndarray, sections: np.ndarray, scale: bool) -> float:
    """Return the macro-F1 of a logistic regression on the section left out, averaged over sections."""
    scores = []
    for section in np.unique(sections):
        test = sections == section
        regression = LogisticRegression(C=1.0, max_iter=2000)
        classifier = make_pipeline(StandardScaler(), regression) if scale else regression
        with threadpool_limits(1):  # these fits are small: more threads only wait for each other
            predicted = classifier.fit(features[~test], labels[~test]).predict(features[test])
        scores.append(f1_score(labels[test], predicted, average="macro"))
    return float(np.mean(scores))


def probe(adata: ad.AnnData, features: np.ndarray) -> dict[str, float]:
    """Return the scores of both targets, on standardised features and (``_unscaled``) on features as they are.

    Standardising gives every principal component the same weight and so costs the neighbour means more than it gives.
    """
    sections = adata.obs[SECTION].to_numpy()
    scores = {}
    for target, (suffix, scale) in product(TARGETS, {"": True, "_unscaled": False}.items()):
        labels = adata.obs[target].to_numpy()
        scores[target + suffix] = round(leave_one_section_out(features, labels, sections, scale), 6)
    return scores


def moved_sections(coordinates: np.ndarray, sections: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return coordinates with every section mirrored, rotated by a random angle, and shifted by up to its extent."""
    moved = np.empty_like(coordinates, dtype=float)
    for section in np.unique(sections):
        rows = sections == section
        angle = rng.uniform(0.0, 2.0 * np.pi)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shift = rng.uniform(-1.0, 1.0, size=2) * np.ptp(coordinates[rows], axis=0)
        moved[rows] = coordinates[rows] * [-1.0, 1.0] @ rotation.T + shift
    return moved


def mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Return the cosine between rows of two arrays ``(n_cells, n_latent)``, averaged over cells."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.mean(np.sum(first * second, axis=1) / np.maximum(norms, 1e-12)))


def fit_cellplm(adata: ad.AnnData, encoder: str, position: str, seed: int, args: argparse.Namespace) -> Any:
    """Return a CellPLM trained without labels on all sections."""
    from cellplm_scvi import CellPLM

    seed_everything(seed, args.threads)
    CellPLM.setup_anndata(adata, batch_key=SECTION, sample_key=SECTION, spatial_key=SPATIAL)
    model = CellPLM(adata, **{"encoder": encoder, "position": position, **args.cellplm_kwargs})
    defaults = {"accelerator": args.accelerator, "devices": 1, "enable_progress_bar": False}
    model.train(**{**defaults, **args.train_kwargs})
    return model


def stability(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Return the mean cosine between features ``(n_cells, n_features)`` before and after :func:`moved_sections`.

    ``stability_centred`` takes the mean of the features away first: a part that all cells share makes cosines high.
    """
    centre = before.mean(axis=0)
    return {
        "stability": round(mean_cosine(before, after), 6),
        "stability_centred": round(mean_cosine(before - centre, after - centre), 6),
    }


def moved_copy(adata: ad.AnnData, seed: int) -> ad.AnnData:
    """Return a copy of the data with every section mirrored, rotated and shifted."""
    moved = adata.copy()
    sections = adata.obs[SECTION].to_numpy()
    moved.obsm[SPATIAL] = moved_sections(adata.obsm[SPATIAL], sections, np.random.default_rng(seed))
    return moved


def cellplm_result(adata: ad.AnnData, encoder: str, position: str, seed: int, args: argparse.Namespace) -> Row:
    """Train one variant; return its scores, its stability and the wall seconds from counts to embedding."""
    own = adata.copy()
    start = time.perf_counter()
    model = fit_cellplm(own, encoder, position, seed, args)
    embedding = np.asarray(model.get_latent_representation())
    seconds = time.perf_counter() - start
    after = np.asarray(model.get_latent_representation(moved_copy(own, seed)))
    return {**probe(adata, embedding), **stability(embedding, after), "seconds": round(seconds, 2)}


def baseline_result(adata: ad.AnnData, sizes: tuple[int, ...]) -> Row:
    """Return a baseline's scores, its stability and the wall seconds from counts to features."""
    features, seconds = timed(partial(baseline_features, adata, sizes))
    after = baseline_features(moved_copy(adata, seed=0), sizes)
    return {**probe(adata, features), **stability(features, after), "seconds": round(seconds, 2)}


def wanted(args: argparse.Namespace) -> Iterator[tuple[Row, partial[Row]]]:
    """Yield the identity of each result that the command line asks for, and what computes it."""
    if "baselines" in args.methods:
        for name, sizes in BASELINES.items():
            yield {"method": name, "seed": 0, "kwargs": {}}, partial(baseline_result, sizes=sizes)
    if "cellplm" in args.methods:
        for seed, encoder, position in product(args.seeds, args.encoders, args.positions):
            kwargs = {**args.cellplm_kwargs, **args.train_kwargs}
            identity = {"method": f"CellPLM, {encoder}, {position}", "seed": seed, "kwargs": kwargs}
            yield identity, partial(cellplm_result, encoder=encoder, position=position, seed=seed, args=args)


def run(args: argparse.Namespace, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    adata = read_dataset(args.data, DATASET)
    for identity, compute in wanted(args):
        if identity in results:
            continue
        row = {**identity, **compute(adata), "contended": args.contended, "threads": args.threads}
        results.append({**row, "accelerator": args.accelerator, "versions": versions(*PACKAGES)})
        print(f"{row['method']} seed {row['seed']}: region {row['region']:.3f}, {row['seconds']:.1f} s", flush=True)


def table(rows: list[Row]) -> str:
    """Return two Markdown tables, mean ± standard deviation over seeds: all methods by default, and variants of CellPLM."""
    scores = {
        "region": ("region", 3),
        "cell_type": ("cell type", 3),
        "region_unscaled": ("region, unscaled", 3),
        "cell_type_unscaled": ("cell type, unscaled", 3),
    }
    columns = {**scores, "stability": ("stability", 3), "stability_centred": ("stability, centred", 3)}
    methods = [f"CellPLM, {encoder}, {position}" for encoder, position in product(ENCODERS, POSITIONS)]
    default = markdown_table([row for row in rows if not row["kwargs"]], ("method",), columns, [*BASELINES, *methods])
    variants = [row for row in rows if row["kwargs"]]
    return default + "\n\n" + markdown_table(variants, ("method", "kwargs"), scores, methods)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser(__doc__, "spatial")
    parser.add_argument("--methods", nargs="+", choices=("baselines", "cellplm"), default=["baselines", "cellplm"])
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS))
    return parser.parse_args()


def main() -> None:
    """Run what is missing, or print the table."""
    args = parse_args()
    results = ResultFile(args.out, KEY)
    if not args.table:
        run(args, results)
    print(table(results.rows()))


if __name__ == "__main__":
    main()
