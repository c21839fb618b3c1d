"""Distributed training, plain and sharded, on two processes of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
import scvi
import scipy.sparse as sp
from anndata import AnnData
from cellplm_scvi import CellPLM
from lightning.pytorch import Callback

class Steps(Callback):
    def __init__(self):
        self.cells = []
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.cells += batch["library"].tolist()

scvi.settings.seed = 0
rng = np.random.default_rng(0)
n = 91
adata = AnnData(sp.csr_matrix(rng.poisson(2.0, (n, 20)).astype(np.float32)))
adata.obs["sample"] = rng.integers(3, size=n).astype(str)
adata.obsm["spatial"] = rng.normal(size=(n, 2))
CellPLM.setup_anndata(adata, sample_key="sample", spatial_key="spatial")
model = CellPLM(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4, n_components=3, n_neighbours=4, n_niche=2)
steps = Steps()
model.train(
    max_epochs=3, accelerator="cpu", devices=2, strategy=sys.argv[2], batch_size=16, callbacks=[steps],
    check_val_every_n_epoch=1, enable_progress_bar=False,
)
rank = torch.distributed.get_rank()
weights = np.concatenate([p.detach().numpy().ravel() for p in model.module.parameters()])
z = model.get_latent_representation()
np.savez(
    f"{sys.argv[1]}/rank{rank}.npz", weights=weights, z=z, cells=steps.cells, elbo=model.get_elbo(),
    n_steps=model.trainer.global_step,
    training=np.asarray(adata.X.sum(1)).ravel()[model.train_indices],
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_share_the_cells_and_end_alike(tmp_path, strategy):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), strategy],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(2))
    assert int(first["n_steps"]) == int(second["n_steps"]) > 2
    np.testing.assert_allclose(first["weights"], second["weights"], atol=1e-6)
    np.testing.assert_allclose(first["z"], second["z"], atol=1e-5)
    assert np.isfinite(first["z"]).all()
    assert np.isfinite(first["elbo"])
    # together they see every training cell in each epoch, and a minibatch twice where they are odd in number
    seen = np.concatenate([first["cells"], second["cells"]])
    assert seen.size >= 3 * first["training"].size
    assert set(seen) == set(first["training"])
