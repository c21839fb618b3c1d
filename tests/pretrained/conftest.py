"""Published models with the numbers that the published code computes from them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from torch import Tensor

HERE = Path(__file__).parent
SHIPPED = HERE / "cases"
#: the complete cases, where the machine has them
SHARED = HERE.parents[2] / "shared" / "parity"


@dataclass(frozen=True)
class Case:
    """A small published model: its files, its inputs, and what the published code makes of them."""

    name: str
    prefix: Path
    arrays: dict[str, np.ndarray]
    overwrite: dict[str, Any]

    @property
    def config_path(self) -> Path:
        return Path(f"{self.prefix}.config.json")

    @property
    def checkpoint_path(self) -> Path:
        return Path(f"{self.prefix}.best.ckpt")

    @property
    def entries(self) -> dict[str, Any]:
        """The configuration."""
        return json.loads(self.config_path.read_text())

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict as published."""
        return torch.load(self.checkpoint_path, weights_only=True)["model_state_dict"]

    @property
    def passes(self) -> list[str]:
        """Names of the passes with a loss."""
        return sorted({key.split("/")[0] for key in self.arrays if key.endswith("/loss")})


@cache
def stored_case(name: str) -> tuple[dict[str, np.ndarray], bytes]:
    """Arrays of a case that ships with the tests, and its checkpoint as the published code writes it.

    To be small, it lacks the constant table of positions, and its weights are stored by byte of a float.
    """
    with np.load(SHIPPED / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    shapes = json.loads(str(arrays.pop("weight_shapes")))
    values = torch.from_numpy(np.ascontiguousarray(arrays.pop("weight_bytes").T).view(np.float32).ravel())
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    weights = {key: part.reshape(shape).clone() for (key, shape), part in zip(shapes.items(), parts, strict=True)}
    content = io.BytesIO()
    torch.save({"model_state_dict": weights}, content)
    return arrays, content.getvalue()


def shipped_case(name: str, folder: Path) -> Case:
    """Write the files of a case that ships with the tests."""
    arrays, checkpoint = stored_case(name)
    (folder / f"{name}.best.ckpt").write_bytes(checkpoint)
    (folder / f"{name}.config.json").write_text((SHIPPED / f"{name}.config.json").read_text())
    return Case(name, folder / name, dict(arrays), {})


def shared_case(name: str) -> Case:
    """A complete case."""
    folder = SHARED / name
    with np.load(folder / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    meta = json.loads((folder / f"{name}.meta.json").read_text())
    return Case(name, folder / name, arrays, meta["overwrite_config"])


@pytest.fixture
def case_named(tmp_path: Path) -> Callable[[str], Case]:
    """A case by name; ``shared:`` before it asks for the complete one."""

    def find(name: str) -> Case:
        if not name.startswith("shared:"):
            return shipped_case(name, tmp_path)
        name = name.removeprefix("shared:")
        if not (SHARED / name).is_dir():
            pytest.skip(f"the complete parity case {name} is not on this machine (looked for ../shared/parity)")
        return shared_case(name)

    return find


@pytest.fixture
def mixture_case(tmp_path: Path) -> Case:
    """Gaussian mixture, NB decoder, batch and dataset covariates."""
    return shipped_case("a_gmvae_nb_cov", tmp_path)


@pytest.fixture
def annotation_case(tmp_path: Path) -> Case:
    """Deterministic latent space and annotation head."""
    return shipped_case("d_ae_annotation", tmp_path)


@pytest.fixture
def published_data(mixture_case: Case) -> AnnData:
    """The cells of the mixture case that have counts, named by the Ensembl ids of its vocabulary."""
    arrays = {key.removeprefix("in/x_"): value for key, value in mixture_case.arrays.items() if key.startswith("in/x_")}
    counts = sp.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=arrays["shape"])
    counts = counts[np.asarray(counts.sum(1)).ravel() > 0][:48]
    cells, genes = ([f"cell{n}" for n in range(counts.shape[0])], mixture_case.entries["gene_list"])
    return AnnData(counts, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes))
