"""Measure how well the change of expression by perturbations is predicted that were not in the training data.

The change is that of log1p of the mean over cells of normalised counts, against the control cells that a prediction starts
from. (The mean of log1p would also change with the depth of cells.) What is held out: perturbations (none of their cells is trained on), a replicate (its perturbed cells), pairs of
perturbations that were each seen, and the stimulated cells of a cell type. Lines that are on file are not computed again;
``--table`` prints them as Markdown.

    python benchmarks/perturbation.py
    python benchmarks/perturbation.py --table
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp
from _common import (
    ResultFile,
    Row,
    benchmark_parser,
    kept_or_trained,
    markdown_table,
    read_dataset,
    seed_everything,
    versions,
)
from scipy.stats import rankdata
from sklearn.decomposition import PCA

KEY = ("task", "effect", "method", "seed", "kwargs")
PACKAGES = ("scvi-tools", "scanpy", "scikit-learn", "torch")
CONTROL = "control"
N_TOP = 20
#: a perturbation has a real effect if the t statistic of any gene exceeds this
REAL = 6.0


@dataclass
class Task:
    """Cells to train on, control cells to start from, and cells to be predicted, all of the same genes.

    Parameters
    ----------
    train
        ``obs`` has ``perturbation``, ``batch``, ``library`` and ``cell_type``.
    start
        Control cells.
    truth
        Perturbed cells by name of the perturbation.
    where, name
        Cell type in which it is predicted, where that is the question, and name of the task.
    """

    train: ad.AnnData
    start: ad.AnnData
    truth: dict[str, ad.AnnData]
    where: str = ""
    name: str = ""

    @cached_property
    def scale(self) -> float:
        """Library size that counts are scaled to."""
        return float(np.median(self.train.obs["library"]))

    def logs(self, adata: ad.AnnData) -> sp.csr_matrix:
        """Return log1p of normalised counts."""
        return self.normalised(adata).log1p()

    def normalised(self, adata: ad.AnnData) -> sp.csr_matrix:
        """Return counts scaled to one library size."""
        return sp.csr_matrix(sp.diags(self.scale / np.maximum(adata.obs["library"].to_numpy(), 1.0)) @ adata.X)

    def mean(self, adata: ad.AnnData) -> np.ndarray:
        """Return log1p of the mean over cells of normalised counts."""
        return self.log_mean(np.asarray(self.normalised(adata).mean(0)).ravel() / self.scale)

    def log_mean(self, shares: np.ndarray) -> np.ndarray:
        """Return log1p of shares scaled to the library size."""
        return np.log1p(shares * self.scale)

    @cached_property
    def changes(self) -> dict[str, np.ndarray]:
        """Observed change of each perturbation, averaged over the batches or cell types of the training cells."""
        found: dict[str, list[np.ndarray]] = {}
        for (batch, kind), cells in self.train.obs.groupby(["batch", "cell_type"], observed=True).indices.items():
            del batch, kind
            part = self.train[cells]
            names = part.obs["perturbation"].astype(str)
            if not (names == CONTROL).any():
                continue
            base = self.mean(part[(names == CONTROL).to_numpy()])
            for name in sorted(set(names) - {CONTROL}):
                found.setdefault(name, []).append(self.mean(part[(names == name).to_numpy()]) - base)
        return {name: np.mean(changes, axis=0) for name, changes in found.items()}

    @cached_property
    def loadings(self) -> np.ndarray:
        """Loadings of genes on 10 principal components of the training cells, (n_genes, 10)."""
        return PCA(10, random_state=0).fit(self.logs(self.train).toarray()).components_.T


def prepared(adata: ad.AnnData) -> ad.AnnData:
    """Return the data with the columns of ``obs`` that a task needs."""
    adata.X = sp.csr_matrix(adata.X).astype(np.float32)
    total = np.asarray(adata.X.sum(1)).ravel()
    adata.obs["library"] = adata.obs.get("n_counts_all_genes", total)
    adata.obs["library"] = np.maximum(adata.obs["library"].astype(float), total)
    return adata[total > 0].copy()


def masks(adata: ad.AnnData, held_out: list[str], seed: int) -> tuple[ad.AnnData, ad.AnnData, dict[str, ad.AnnData]]:
    """Split into training cells, control cells, and those of the perturbations held out.

    The control cells are halved: changes observed in training and to be predicted would share their sampling error otherwise.
    """
    names = adata.obs["perturbation"].astype(str)
    control = np.random.default_rng(seed).permutation(np.flatnonzero(names == CONTROL))
    start = np.isin(np.arange(adata.n_obs), control[: control.size // 2])
    return (
        adata[~names.isin(held_out).to_numpy() & ~start].copy(),
        adata[start].copy(),
        {name: adata[(names == name).to_numpy()].copy() for name in held_out},
    )


def papalexi_perturbations(folder: Path, seed: int) -> list[Task]:
    """Hold out a third of the perturbations of THP-1 cells."""
    adata = prepared(read_dataset(folder, "papalexi2021_thp1_eccite_rep12"))
    names = sorted(set(adata.obs["perturbation"].astype(str)) - {CONTROL})
    return [
        Task(*masks(adata, sorted(np.random.default_rng(seed).choice(names, len(names) // 3, replace=False)), seed))
    ]


def papalexi_replicate(folder: Path, seed: int) -> list[Task]:
    """Hold out the perturbed cells of one replicate."""
    adata = prepared(read_dataset(folder, "papalexi2021_thp1_eccite_rep12"))
    held_out = adata.obs["batch"].astype("category").cat.categories[seed % 2]
    there, names = adata.obs["batch"] == held_out, adata.obs["perturbation"].astype(str)
    truth = {n: adata[(there & (names == n)).to_numpy()].copy() for n in sorted(set(names) - {CONTROL})}
    truth = {name: cells for name, cells in truth.items() if cells.n_obs >= 30}
    train = adata[(~there | (names == CONTROL)).to_numpy()].copy()
    return [Task(train, adata[(there & (names == CONTROL)).to_numpy()].copy(), truth)]


def norman_doubles(folder: Path, seed: int) -> list[Task]:
    """Hold out the pairs both of whose genes were perturbed alone."""
    adata = prepared(read_dataset(folder, "norman2019_k562_crispra_sub"))
    names = set(adata.obs["perturbation"].astype(str))
    return [Task(*masks(adata, sorted(n for n in names if "+" in n and set(n.split("+")) <= names), seed))]


def norman_singles(folder: Path, seed: int) -> list[Task]:
    """Hold out a third of the single perturbations, and the pairs with them."""
    adata = prepared(read_dataset(folder, "norman2019_k562_crispra_sub"))
    names = set(adata.obs["perturbation"].astype(str))
    singles = sorted(name for name in names - {CONTROL} if "+" not in name)
    held_out = sorted(np.random.default_rng(seed).choice(singles, len(singles) // 3, replace=False))
    with_them = [name for name in names if "+" in name and set(name.split("+")) & set(held_out)]
    return [Task(*masks(adata[~adata.obs["perturbation"].isin(with_them).to_numpy()].copy(), held_out, seed))]


def kang_types(folder: Path, seed: int) -> list[Task]:
    """Hold out the stimulated cells of each cell type in turn; genes are the 2,000 most variable of the training cells."""
    del seed
    adata = prepared(read_dataset(folder, "kang2018_ifnb_stim_ctrl"))
    adata.obs["perturbation"] = adata.obs["condition"].astype(str).replace({"stimulated": "IFNB"})
    adata.obs["batch"] = "all"  # control and stimulated cells are the two batches
    tasks = []
    for kind in sorted(adata.obs["cell_type"].unique()):
        of_kind, control = adata.obs["cell_type"] == kind, adata.obs["perturbation"] == CONTROL
        train = adata[(~of_kind | control).to_numpy()].copy()
        normalised = ad.AnnData(train.X.copy(), var=train.var[[]])
        sc.pp.normalize_total(normalised)
        sc.pp.log1p(normalised)
        sc.pp.highly_variable_genes(normalised, n_top_genes=2000)
        genes = normalised.var["highly_variable"].to_numpy()
        parts = [adata[(of_kind & mask).to_numpy(), genes].copy() for mask in (control, ~control)]
        tasks.append(Task(train[:, genes].copy(), parts[0], {"IFNB": parts[1]}, where=kind))
    return tasks


TASKS: dict[str, Callable[[Path, int], list[Task]]] = {
    "papalexi, perturbations": papalexi_perturbations,
    "papalexi, replicate": papalexi_replicate,
    "norman, pairs": norman_doubles,
    "norman, singles": norman_singles,
    "kang, cell types": kang_types,
}

#: predicted change of each perturbation held out, (n_genes,)
Method = Callable[[Task, int, argparse.Namespace], dict[str, np.ndarray]]


def no_change(task: Task, seed: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """No change."""
    return {name: np.zeros(task.train.n_vars) for name in task.truth}


def mean_perturbed(task: Task, seed: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Mean of the observed changes of all perturbations."""
    mean = np.mean(list(task.changes.values()), axis=0)
    return dict.fromkeys(task.truth, mean)


def additive(task: Task, seed: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Observed change elsewhere, or the sum of those of the elements; nothing for what was not seen."""
    zero = np.zeros(task.train.n_vars)
    return {
        name: task.changes.get(name, sum((task.changes.get(e, zero) for e in name.split("+")), zero))
        for name in task.truth
    }


def ridge(task: Task, seed: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Linear model of Ahlmann-Eltze et al. (2025): changes on gene loadings, from the loadings of the perturbed genes."""
    genes = {name: i for i, name in enumerate(task.train.var_names)}
    loadings = task.loadings

    def embedding(name: str) -> np.ndarray:
        known = [loadings[genes[e]] for e in name.split("+") if e in genes]
        return np.sum(known, axis=0) if known else np.zeros(loadings.shape[1])

    names = list(task.changes)
    y = np.stack([task.changes[name] for name in names])
    p = np.stack([embedding(name) for name in names])
    mean = y.mean(0)
    inner = np.linalg.solve(p.T @ p + 0.1 * np.eye(p.shape[1]), p.T @ (y - mean))
    weight = inner @ loadings @ np.linalg.inv(loadings.T @ loadings + 0.1 * np.eye(p.shape[1]))
    return {name: mean + embedding(name) @ weight @ loadings.T for name in task.truth}


def cellplm(task: Task, seed: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """CellPLM trained on the training cells; predictions start from the control cells."""
    from cellplm_scvi import CellPLM

    seed_everything(seed, args.threads)
    train = task.train
    CellPLM.setup_anndata(
        train,
        batch_key="batch",
        labels_key="cell_type",
        perturbation_key="perturbation",
        control_category=CONTROL,
        size_factor_key="library",
    )

    def trained() -> CellPLM:
        model = CellPLM(train, **args.cellplm_kwargs)
        model.train(
            **{"accelerator": args.accelerator, "devices": 1, "enable_progress_bar": False, **args.train_kwargs}
        )
        return model

    name = f"{task.name}-{seed}-{task.where}"
    model = kept_or_trained(args.models, name, lambda path: CellPLM.load(path, train, args.accelerator), trained)
    model.train_perturbation(progress_bar=False, **args.perturbation_kwargs)
    start = task.start.copy()
    before = task.log_mean(model.get_normalized_expression(start).to_numpy().mean(0))
    return {
        name: task.log_mean(model.predict_perturbation(name, start).to_numpy().mean(0)) - before for name in task.truth
    }


METHODS: dict[str, Method] = {
    "no change": no_change,
    "mean of perturbed": mean_perturbed,
    "additive": additive,
    "ridge on gene loadings": ridge,
    "CellPLM": cellplm,
}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Pearson correlation, 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 1e-12 else 0.0


def t_statistics(task: Task, perturbed: ad.AnnData) -> np.ndarray:
    """Return Welch's t statistic of each gene."""

    def moments(x: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        mean = np.asarray(x.mean(0)).ravel()
        return mean, (np.asarray(x.multiply(x).mean(0)).ravel() - mean**2) / x.shape[0]

    (m1, v1), (m0, v0) = moments(task.logs(perturbed)), moments(task.logs(task.start))
    return np.abs(m1 - m0) / np.sqrt(v1 + v0 + 1e-6)


def scores(tasks: list[Task], predicted: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Return mean scores over the perturbations with a real effect, and over the others."""
    truths = [{n: task.mean(x) - task.mean(task.start) for n, x in task.truth.items()} for task in tasks]
    found: dict[str, list[dict[str, float]]] = {"real": [], "null": []}
    for task, truth, prediction in zip(tasks, truths, predicted, strict=True):
        mean = np.mean(list(task.changes.values()), axis=0)
        for name, true in truth.items():
            statistic, change = t_statistics(task, task.truth[name]), prediction[name]
            top = np.argsort(-statistic)[:N_TOP]
            # with tasks of a perturbation each, their truths are what it is told from, on the genes that they share
            others = list(truth.values()) if len(truth) > 1 else _same_genes(tasks, truths, task)
            own = change if len(truth) > 1 else _on(tasks, task, change)
            target = true if len(truth) > 1 else _on(tasks, task, true)
            distance = np.array([np.abs(own - other).mean() for other in others])
            rank = rankdata(distance)[int(np.argmin([np.abs(target - other).sum() for other in others]))]
            row = {
                "pearson": correlation(change, true),
                "pearson_top": correlation(change[top], true[top]),
                "pearson_from_mean": correlation(change - mean, true - mean) if len(truth) > 1 else 0.0,
                "mae": float(np.abs(change - true).mean()),
                "mae_top": float(np.abs(change - true)[top].mean()),
                "discrimination": float(1 - (rank - 1) / max(len(others) - 1, 1)),
            }
            found["real" if statistic.max() > REAL else "null"].append(row)
    return {
        effect: {key: round(float(np.mean([row[key] for row in rows])), 6) for key in rows[0]} | {"n": len(rows)}
        for effect, rows in found.items()
        if rows
    }


def _shared(tasks: list[Task]) -> list[str]:
    shared = set(tasks[0].train.var_names)
    for task in tasks[1:]:
        shared &= set(task.train.var_names)
    return sorted(shared)


def _on(tasks: list[Task], task: Task, values: np.ndarray) -> np.ndarray:
    return values[task.train.var_names.get_indexer(_shared(tasks))]


def _same_genes(tasks: list[Task], truths: list[dict[str, np.ndarray]], task: Task) -> list[np.ndarray]:
    return [_on(tasks, t, next(iter(truth.values()))) for t, truth in zip(tasks, truths, strict=True)]


def run(args: argparse.Namespace, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    for name in args.tasks:
        for seed in args.seeds:
            tasks: list[Task] | None = None
            for method in args.methods:
                kwargs = {**args.cellplm_kwargs, **args.train_kwargs, **args.perturbation_kwargs}
                identity = {
                    "task": name, "method": method, "seed": seed, "kwargs": kwargs if method == "CellPLM" else {}
                }  # fmt: skip
                if any({**identity, "effect": effect} in results for effect in ("real", "null")):
                    continue
                tasks = tasks or [replace(task, name=name) for task in TASKS[name](args.data, seed)]
                start = time.perf_counter()
                predicted = [METHODS[method](task, seed, args) for task in tasks]
                seconds = round(time.perf_counter() - start, 1)
                for effect, row in scores(tasks, predicted).items():
                    results.append(
                        {**identity, "effect": effect, **row, "seconds": seconds, "threads": args.threads}
                        | {"contended": args.contended, "versions": versions(*PACKAGES)}
                    )
                    print(name, method, seed, effect, row, seconds, flush=True)


def table(rows: list[Row]) -> str:
    """Return the Markdown table: mean ± standard deviation over seeds."""
    columns = {
        "pearson": ("Pearson", 3),
        "pearson_top": ("Pearson, top 20", 3),
        "pearson_from_mean": ("Pearson from mean", 3),
        "mae": ("MAE", 4),
        "mae_top": ("MAE, top 20", 3),
        "discrimination": ("discrimination", 2),
    }
    return markdown_table(rows, ("task", "effect", "method"), columns, [*TASKS, "real", "null", *METHODS])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser(__doc__, "perturbation", models=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--perturbation-kwargs", type=json.loads, default={}, help="JSON for train_perturbation(...)")
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
