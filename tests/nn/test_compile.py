"""A compiled encoder is one graph for all sizes of samples and minibatches."""

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.testing import CompileCounter

from cellplm_scvi import CellPLM
from cellplm_scvi.data import synthetic_tissues
from cellplm_scvi.nn import Neighbourhood, TransformerEncoder

SIZES = ([20], [13], [30, 12], [5, 4, 3], [1] * 9, [40, 2], [7], [8, 8, 8, 8, 8])


@pytest.mark.parametrize(("kind", "local"), [("flow", True), ("softmax", False), ("mlp", False)])
def test_no_graph_breaks_and_no_recompilation_storm(kind, local):
    """``fullgraph`` raises at a break; one sample, several, and samples of one cell each may take a graph of their own."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder = TransformerEncoder(kind, 8, 1, 2, 0.0, local=local)
    expected, compiler = [], CompileCounter()
    batches = []
    for sizes in SIZES:
        x, packing = torch.randn(sum(sizes), 8), encoder.packing(torch.tensor(sizes))
        near = Neighbourhood(torch.randint(-1, len(x), (len(x), 3)), torch.rand(len(x), 3)) if local else None
        batches.append((x, packing, near))
        expected.append(encoder(*batches[-1]))
    encoder.compile(dynamic=True, fullgraph=True, backend=compiler)
    for batch, result in zip(batches, expected, strict=True):
        torch.testing.assert_close(encoder(*batch), result, rtol=1e-5, atol=1e-6)
    assert 1 <= compiler.frame_count <= 4


def test_training_compiles_and_results_do_not_depend_on_it(tmp_path):
    """``plan_kwargs={"compile": True}`` trains; afterwards the model is what it saves."""
    torch._dynamo.reset()
    adata = synthetic_tissues(n_samples=2, n_cells=60, n_genes=30, seed=0)
    CellPLM.setup_anndata(adata, sample_key="sample")
    model = CellPLM(adata, n_hidden=8, n_layers=1, n_heads=2, n_latent=4)
    compiler = CompileCounter()
    compiled = {"compile": True, "compile_kwargs": {"backend": compiler}}
    model.train(max_epochs=2, accelerator="cpu", plan_kwargs=compiled, enable_progress_bar=False)
    assert compiler.frame_count >= 1
    model.save(tmp_path / "model")
    loaded = CellPLM.load(tmp_path / "model", adata)
    n_compiled = compiler.frame_count
    torch.testing.assert_close(
        torch.from_numpy(loaded.get_latent_representation()), torch.from_numpy(model.get_latent_representation())
    )
    assert compiler.frame_count == n_compiled


def test_training_that_stops_leaves_nothing_compiled():
    adata = synthetic_tissues(n_samples=2, n_cells=60, n_genes=30, seed=0)
    CellPLM.setup_anndata(adata, sample_key="sample")
    model = CellPLM(adata, n_hidden=16, n_layers=1, n_latent=4, n_heads=2)
    plan = {"compile": True, "compile_kwargs": {"backend": CompileCounter()}}
    with pytest.raises(RuntimeError, match="enough"):
        model.train(max_epochs=1, accelerator="cpu", plan_kwargs=plan, enable_progress_bar=False, callbacks=[Stop()])
    assert model.module.encoder._compiled_call_impl is None


class Stop(Callback):
    def on_train_batch_end(self, *args: object) -> None:
        raise RuntimeError("enough")
