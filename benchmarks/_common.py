"""What the benchmark scripts share: where data lie, resumable JSON lines, and tables of mean and spread."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = ROOT.parent / "shared" / "data"
RESULTS_DIR = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def read_dataset(folder: Path, name: str) -> ad.AnnData:
    """Read ``folder/name.h5ad``, or leave with a message that says where it was looked for."""
    path = folder / f"{name}.h5ad"
    if not path.is_file():
        sys.exit(f"{path} is absent: this benchmark needs it. Pass --data the folder that holds {name}.h5ad.")
    return ad.read_h5ad(path)


def seed_everything(seed: int, threads: int) -> None:
    """Seed Python, NumPy and PyTorch, and bound the threads of PyTorch."""
    import scvi
    import torch

    torch.set_num_threads(threads)
    scvi.settings.seed = seed


def timed(compute: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``compute`` returns and the wall seconds that it took."""
    start = time.perf_counter()
    result = compute()
    return result, time.perf_counter() - start


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {package: version(package) for package in packages}


class ResultFile:
    """A file of JSON lines, one result a line, that a stopped run can continue.

    Parameters
    ----------
    path
        The file; the suffix ``.jsonl`` is added where it is missing.
    key
        The fields that tell two results apart.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path = path if path.suffix == ".jsonl" else path.with_name(path.name + ".jsonl")
        self.key = tuple(key)

    def rows(self) -> list[Row]:
        """Return the results on file, oldest first."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def __contains__(self, wanted: Mapping[str, Any]) -> bool:
        return self._identity(wanted) in {self._identity(row) for row in self.rows()}

    def append(self, row: Row) -> None:
        """Write one result at the end of the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _identity(self, row: Mapping[str, Any]) -> str:
        return json.dumps([row[field] for field in self.key], sort_keys=True)


def benchmark_parser(doc: str | None, name: str, *, models: bool = False) -> argparse.ArgumentParser:
    """Return a parser of what all scripts are told; ``doc`` is the script's docstring, ``name`` that of its result file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA_DIR, help="folder of the .h5ad files")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / name, help="file of JSON lines")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--cellplm-kwargs", type=json.loads, default={}, help="JSON for CellPLM(adata, ...)")
    parser.add_argument("--train-kwargs", type=json.loads, default={}, help="JSON for CellPLM.train(...)")
    if models:
        parser.add_argument("--models", type=Path, help="folder where trained CellPLMs are kept and taken from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--contended", action="store_true", help="note that other programs ran: times are not final")
    parser.add_argument("--table", action="store_true", help="print the Markdown table of what is on file, run nothing")
    return parser


def kept_or_trained(folder: Path | None, name: str, load: Callable[[Path], Any], train: Callable[[], Any]) -> Any:
    """Return the model ``name`` of the folder of models, or train it and keep it there; ``None`` keeps nothing."""
    if folder is None:
        return train()
    if not (folder / name).is_dir():
        model = train()
        model.save(folder / name)
        return model
    return load(folder / name)


def mean_and_sd(values: Iterable[float], digits: int) -> str:
    """Format values as ``mean ± sd`` (n - 1 in the denominator), or as the value where there is one."""
    numbers = np.asarray(list(values), dtype=float)
    mean = f"{numbers.mean():.{digits}f}"
    return mean if numbers.size == 1 else f"{mean} ± {numbers.std(ddof=1):.{digits}f}"


def markdown_table(
    rows: Sequence[Row], group_by: Sequence[str], columns: Mapping[str, tuple[str, int]], order: Sequence[str] = ()
) -> str:
    """Return a Markdown table with one line a group of rows.

    Parameters
    ----------
    rows
        The results.
    group_by
        Fields whose values make a group; they are the first columns. Empty mappings are left blank.
    columns
        Field of a result -> (heading, digits).
    order
        Values of the ``group_by`` fields in the order wanted; others follow as found.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(_cell(row[field]) for field in group_by), []).append(row)
    rank = {name: position for position, name in enumerate(order)}
    names = sorted(groups, key=lambda name: [rank.get(part, len(rank)) for part in name])
    heads = [*group_by, "n", *(heading for heading, _ in columns.values())]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in names:
        members = groups[name]
        cells = [mean_and_sd((row[field] for row in members), digits) for field, (_, digits) in columns.items()]
        lines.append("| " + " | ".join([*name, str(len(members)), *cells]) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    return str(value)
