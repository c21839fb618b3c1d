"""Cells a second and peak memory of streaming whole samples, beside annbatch's own random loader on the same store.

Two corpora: a small panel, tiled to 400,000 cells, and a synthetic one of 500,000 cells x 19,374 genes of which each cell
has a tenth. Both sides read minibatches of as many cells, in turn, each measurement in a process of its own.

    python benchmarks/streaming.py build --folder /tmp/corpora
    python benchmarks/streaming.py run --folder /tmp/corpora
    python benchmarks/streaming.py table
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import DATA_DIR, RESULTS_DIR, ResultFile, markdown_table, read_dataset

RESULTS = RESULTS_DIR / "streaming.jsonl"
SIDES = ("annbatch, random cells", "whole samples")
BATCH = 1024
#: of the published model
N_GENES = 19_374


def gasperini(folder: Path, data: Path, n_cells: int) -> None:
    """K562 cells, 355 genes, in samples of 1 to 20,000 cells."""
    from cellplm_scvi.data import Source, build_corpus

    adata = read_dataset(data, "gasperini2019_k562_40k_unlabelled")
    rng = np.random.default_rng(0)
    sizes = np.concatenate([[20_000, 1, 2], rng.lognormal(6, 1.5, 400).astype(int) + 1])
    sizes = sizes[np.cumsum(sizes) <= adata.n_obs]
    adata.obs["section"] = np.repeat(np.arange(sizes.size + 1), [*sizes, adata.n_obs - sizes.sum()]).astype(str)
    tiles = {f"tile{n}": Source(adata, sample_key="section") for n in range(-(-n_cells // adata.n_obs))}
    build_corpus(tiles, folder / "gasperini")


def synthetic(folder: Path, n_cells: int) -> None:
    """A tenth of the genes of each cell, in samples of a few thousand cells."""
    import anndata as ad

    from cellplm_scvi.data import Source, build_corpus

    file = folder / "synthetic_part.h5ad"
    part = min(n_cells, 50_000)
    if not file.exists():
        rng = np.random.default_rng(0)
        n_counts = N_GENES // 10
        genes = np.sort(rng.integers(0, N_GENES // n_counts, (part, n_counts)) + np.arange(n_counts) * 10, axis=1)
        values = rng.geometric(0.4, part * n_counts).astype(np.float32)
        x = sp.csr_matrix((values, genes.ravel().astype(np.int32), np.arange(part + 1) * n_counts), (part, N_GENES))
        adata = ad.AnnData(x, var=pd.DataFrame(index=[f"gene{n}" for n in range(N_GENES)]))
        adata.obs["section"] = pd.Categorical((np.arange(part) // 2_500).astype(str))
        adata.write_h5ad(file)
    parts = {f"part{n}": Source(file, sample_key="section") for n in range(-(-n_cells // part))}
    build_corpus(parts, folder / "synthetic")


def ours(path: Path) -> Iterator[int]:
    """Cells of each of our minibatches."""
    from cellplm_scvi.data import Corpus
    from cellplm_scvi.data._stream_cells import CorpusCells
    from cellplm_scvi.data._stream_plan import EpochPlan

    corpus = Corpus(path)
    cells = CorpusCells(corpus, corpus.registry["field_registries"])
    sizes = corpus.samples
    plan = EpochPlan(sizes["start"].to_numpy(), sizes["n_cells"].to_numpy(), BATCH // 4, BATCH, seed=0)
    for epoch in itertools.count():
        for minibatch in cells.training(plan.minibatches(epoch)):
            yield minibatch["library"].shape[0]


def annbatch_random(path: Path) -> Iterator[int]:
    """Cells of each minibatch of annbatch, with the settings that its documentation starts from."""
    from annbatch import DatasetCollection, Loader

    from cellplm_scvi.data._corpus import COUNTS_STORE

    def backed(group: Any) -> Any:
        import anndata as ad

        return ad.AnnData(ad.io.sparse_dataset(group["X"]), obs=ad.io.read_elem(group["obs"]))

    loader = Loader(chunk_size=256, preload_nchunks=32, batch_size=BATCH, shuffle=True, to="torch")
    loader.use_collection(DatasetCollection(path / COUNTS_STORE, mode="r"), load_adata=backed)
    while True:
        for batch in loader:
            yield batch["X"].shape[0]


def measure(side: str, path: Path, seconds: float) -> dict[str, float]:
    """Cells a second over at least ``seconds``, after the first 20,000 cells, and peak memory of the process in GB.

    Seconds are of the clock, and of processor time, which bears other programs on the machine better.
    """
    batches = annbatch_random(path) if side == SIDES[0] else ours(path)
    seen = 0
    while seen < 20_000:
        seen += next(batches)
    start, used, seen = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        seen += next(batches)
    return {
        "cells_per_s": seen / (time.perf_counter() - start),
        "cells_per_cpu_s": seen / (time.process_time() - used),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def run(folder: Path, seconds: float, repeats: int) -> None:
    """Measure both sides in turn."""
    results = ResultFile(RESULTS, ["corpus", "n_cells", "side", "repeat"])
    for name in ("gasperini", "synthetic"):
        path = folder / name
        if not (path / "corpus.json").exists():
            print(f"{path} is absent: run the build first.")
            continue
        n_cells = json.loads((path / "corpus.json").read_text())["n_cells"]
        for repeat, side in itertools.product(range(repeats), SIDES):
            row = {"corpus": name, "n_cells": n_cells, "side": side, "repeat": repeat}
            if row in results:
                continue
            command = [sys.executable, __file__, "measure", "--folder", str(path), "--side", side]
            done = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            results.append(row | json.loads(done.stdout.splitlines()[-1]))
            print(results.rows()[-1], flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("build", "run", "measure", "table"))
    parser.add_argument("--folder", type=Path, default=Path("corpora"))
    parser.add_argument("--data", type=Path, default=DATA_DIR)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", type=int, nargs=2, default=(400_000, 500_000), help="of the two corpora")
    args = parser.parse_args()
    if args.action == "build":
        args.folder.mkdir(parents=True, exist_ok=True)
        for build, n_cells in (
            (lambda n: gasperini(args.folder, args.data, n), args.cells[0]),
            (lambda n: synthetic(args.folder, n), args.cells[1]),
        ):
            start = time.perf_counter()
            build(n_cells)
            print(f"{n_cells:,} cells in {time.perf_counter() - start:.0f} s")
    elif args.action == "run":
        run(args.folder, args.seconds, args.repeats)
    elif args.action == "measure":
        print(json.dumps(measure(args.side, args.folder, args.seconds)))
    else:
        columns = {
            "cells_per_s": ("cells / s", 0),
            "cells_per_cpu_s": ("cells / s of processor time", 0),
            "peak_gb": ("peak memory, GB", 2),
        }
        print(markdown_table(ResultFile(RESULTS, ["repeat"]).rows(), ["corpus", "n_cells", "side"], columns))


if __name__ == "__main__":
    main()
