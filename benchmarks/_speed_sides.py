"""The two sides of each speed comparison: functions that do one unit of the same work, ours and the peer's."""

from __future__ import annotations

import json
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cellplm_scvi import CellPLM
from cellplm_scvi.module import PublishedModule
from cellplm_scvi.pretrained._config import read_config
from cellplm_scvi.train import CellPLMTrainingPlan

Work = Callable[[], object]
#: of Lightning, by torch's name of a device
ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}

#: what the published 85M configuration says, but for its list of genes
PUBLISHED: dict[str, Any] = {
    "enc_mod": "flowformer", "enc_hid": 1024, "enc_layers": 4, "latent_mod": "gmvae", "lamda": 5.0,
    "post_latent_dim": 512, "dec_mod": "nbmlp", "dec_hid": 1024, "dec_layers": 2, "model_dropout": 0.2,
    "mask_node_rate": 0.75, "mask_feature_rate": 0.25, "drop_node_rate": 0.3, "norm": "groupnorm", "lr": 2e-4,
    "wd": 1e-8, "w_li": 5.0, "w_en": 5.0, "num_clusters": 16, "out_dim": 19374, "cat_pe": False,
    "max_batch_size": 4000, "dae": True, "mask_beta": True, "batch_num": 12596, "dataset_num": 484,
}  # fmt: skip
#: the same network at 256 units and 2,000 genes
SMALL = {"enc_hid": 256, "dec_hid": 256, "post_latent_dim": 64, "out_dim": 2000, "batch_num": 100, "dataset_num": 10}


def configuration(path: Path | None, **changes: Any) -> dict[str, Any]:
    """Published configuration, from a file or from the constants above; every cell of a minibatch counts."""
    entries = dict(PUBLISHED) if path is None else json.loads(path.read_text())
    entries |= {"drop_node_rate": 0.0} | changes
    if len(entries.get("gene_list", ())) != entries["out_dim"]:
        entries["gene_list"] = [f"ENSG{i:011d}" for i in range(entries["out_dim"])]
    return entries


@cache
def counts(n_cells: int, n_genes: int, density: float) -> sp.csr_matrix:
    """Negative binomial counts with genes of very different rates, about ``density`` of them non-zero."""
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0, 1.6, n_genes)
    for _ in range(30):
        rate *= (density * n_genes / (1 - (1 + rate / 2) ** -2.0).sum()) ** 1.2
    parts = [
        sp.csr_matrix(rng.poisson(rng.gamma(2, 0.5, (min(500, n_cells - i), n_genes)) * rate).astype(np.float32))
        for i in range(0, n_cells, 500)
    ]
    return sp.vstack(parts).tocsr()


def synthetic(n_cells: int, n_genes: int, density: float, *, n_samples: int = 1, spatial: bool = False) -> ad.AnnData:
    """An AnnData of :func:`counts`, in ``n_samples`` samples."""
    sample = pd.Categorical([f"s{i % n_samples}" for i in range(n_cells)])
    adata = ad.AnnData(
        counts(n_cells, n_genes, density).copy(),
        obs=pd.DataFrame({"batch": sample}, index=[f"c{i}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]),
    )
    if spatial:
        adata.obsm["spatial"] = np.random.default_rng(1).random((n_cells, 2)) * n_cells**0.5
    return adata


def published_package(folder: Path) -> bool:
    """Put the published code on the path; its online services are stubs. Whether it is there."""
    if not (folder / "CellPLM").is_dir():
        return False
    for name in ("mygene", "hdf5plugin"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.path.append(str(folder))
    warnings.filterwarnings("ignore")
    return True


def our_step(
    entries: dict[str, Any],
    n_cells: int,
    density: float,
    *,
    bf16: bool = False,
    device: str = "cpu",
    **plan_kwargs: bool,
) -> Work:
    """Loss, backward pass and optimiser step of the published network in our package.

    ``bf16`` is what ``train(precision="bf16-mixed")`` does.
    """
    x = counts(n_cells, entries["out_dim"], density)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.config.json"
        path.write_text(json.dumps(entries))
        module = PublishedModule(read_config(path).config).train().to(device)
    plan = CellPLMTrainingPlan(module, lr=entries["lr"], **plan_kwargs)
    optimizer = plan._optimizer_creator_fn(torch.optim.AdamW)(plan.parameter_groups())
    tensors = {
        "values": torch.from_numpy(x.data),
        "genes": torch.from_numpy(x.indices.astype(np.int64)),
        "offsets": torch.from_numpy(x.indptr.astype(np.int64)),
        "library": torch.from_numpy(np.asarray(x.sum(1), dtype=np.float32).ravel()),
        "lengths": torch.tensor([n_cells]),
        "batch": torch.full((n_cells,), 3),
        "dataset": torch.full((n_cells,), 3),
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    def step() -> object:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = module(tensors)[2].loss
        loss.backward()
        optimizer.step()
        return loss.item()  # which waits for a GPU to be done

    return step


def published_step(entries: dict[str, Any], n_cells: int, density: float, device: str = "cpu") -> Work:
    """The same with the published code: its forward pass in training mode, with its loss."""
    from CellPLM.model.cellformer import OmicsFormer
    from CellPLM.utils.data import XDict, sparse_scipy_to_tensor

    x = sparse_scipy_to_tensor(counts(n_cells, entries["out_dim"], density)).to(device)
    model = OmicsFormer(**entries).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=entries["lr"], weight_decay=entries["wd"])
    cells = {
        "coord": torch.full((n_cells, 2), -1.0),
        "batch": torch.full((n_cells,), 3),
        "dataset": torch.full((n_cells,), 3),
        "gene_mask": torch.ones(entries["out_dim"], dtype=torch.bool),
    }
    cells = {name: tensor.to(device) for name, tensor in cells.items()}

    def step() -> object:
        optimizer.zero_grad()
        loss = model(XDict({"x_seq": x, **cells}))[1]
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def checkpoint(entries: dict[str, Any], folder: Path) -> str:
    """Random weights in the published format, in ``folder``; the prefix of the files."""
    from CellPLM.model.cellformer import OmicsFormer

    torch.manual_seed(0)
    (folder / "speed.config.json").write_text(json.dumps(entries))
    torch.save({"model_state_dict": OmicsFormer(**entries).state_dict()}, folder / "speed.best.ckpt")
    return "speed"


def embedding_data(entries: dict[str, Any], n_cells: int, density: float) -> ad.AnnData:
    """One sample of all genes of a configuration."""
    adata = synthetic(n_cells, entries["out_dim"], density)
    adata.var_names = entries["gene_list"]
    return adata


def our_embedding(
    entries: dict[str, Any], folder: Path, n_cells: int, density: float, *, bf16: bool = False, device: str = "cpu"
) -> Work:
    """Embedding as a user asks for it, of a model that is loaded."""
    adata = embedding_data(entries, n_cells, density)
    prefix = folder / checkpoint(entries, folder)
    model = CellPLM.from_pretrained(prefix, adata, accelerator=ACCELERATORS[device], sample_key="batch")
    return partial(model.get_latent_representation, **({"precision": "bf16-mixed"} if bf16 else {}))


def published_embedding(
    entries: dict[str, Any], folder: Path, n_cells: int, density: float, device: str = "cpu"
) -> Work:
    """The same through the published pipeline."""
    from CellPLM.pipeline.cell_embedding import CellEmbeddingPipeline

    adata = embedding_data(entries, n_cells, density)
    pipeline = CellEmbeddingPipeline(checkpoint(entries, folder), str(folder))
    return lambda: pipeline.predict(adata, device=device)


def our_epoch() -> Work:
    """``CellPLM.train`` for one epoch with defaults, 12,000 cells x 1,300 genes in 8 batches."""
    adata = synthetic(12_000, 1_300, 0.1, n_samples=8)
    CellPLM.setup_anndata(adata, batch_key="batch")
    return lambda: CellPLM(adata).train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)


def wide_model() -> CellPLM:
    """A model of 512 units for 20,000 cells x 2,000 genes; one batch, so that a training ends with its last step."""
    adata = synthetic(20_000, 2_000, 0.1, n_samples=8)
    CellPLM.setup_anndata(adata, sample_key="batch")
    return CellPLM(adata, n_hidden=512, n_layers=4)


def network_epoch(device: str) -> Work:
    """An epoch of :func:`wide_model`, with bfloat16 products."""
    model = wide_model()
    options: dict[str, Any] = {"accelerator": ACCELERATORS[device], "precision": "bf16-mixed", "batch_size": 1024}
    return lambda: model.train(1, enable_progress_bar=False, **options)


def loader_epoch() -> Work:
    """The minibatches of :func:`network_epoch` alone."""
    splitter = wide_model()._splitter(None, None, True, 1024, None)
    splitter.setup("fit")
    return lambda: sum(1 for _ in splitter.train_dataloader())


def scvi_epoch() -> Work:
    """The same for scVI."""
    from scvi.model import SCVI

    adata = synthetic(12_000, 1_300, 0.1, n_samples=8)
    SCVI.setup_anndata(adata, batch_key="batch")
    return lambda: SCVI(adata).train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)


def growth_embedding(n_cells: int, kind: str) -> Work:
    """Embedding of cells x 300 genes: ``"one sample"``, ``"many samples"`` or ``"spatial"``."""
    n_samples = 1 if kind == "one sample" else n_cells // 1000
    adata = synthetic(n_cells, 300, 0.1, n_samples=n_samples, spatial=kind == "spatial")
    keys = {"spatial_key": "spatial"} if kind == "spatial" else {}
    CellPLM.setup_anndata(adata, sample_key="batch", **keys)
    # the same model at every size; what it learned does not change its time
    model = CellPLM(adata, n_hidden=128, n_layers=2, n_latent=32)
    model.is_trained_ = True
    return model.get_latent_representation
