"""Layers whose inside is computed again have the same gradient."""

import pytest
import torch

from cellplm_scvi import CellPLM
from cellplm_scvi.data import synthetic_tissues
from cellplm_scvi.nn import Neighbourhood, TransformerEncoder


@pytest.mark.parametrize(("kind", "local"), [("flow", True), ("softmax", False), ("mlp", False)])
def test_gradient_is_the_same_with_dropout(kind, local):
    """Both passes through a layer draw the same random numbers."""
    torch.manual_seed(0)
    encoder = TransformerEncoder(kind, 8, 2, 2, 0.3, local=local).train()
    x, packing = torch.randn(30, 8, requires_grad=True), encoder.packing(torch.tensor([18, 12]))
    near = Neighbourhood(torch.randint(-1, 30, (30, 3)), torch.rand(30, 3)) if local else None
    leaves = [x, *encoder.parameters()]
    results = []
    for encoder.recompute in (False, True):
        torch.manual_seed(1)
        out = encoder(x, packing, near)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_less_is_kept_for_the_backward_pass():
    """Counted by the bytes of what autograd saves."""
    torch.manual_seed(0)
    encoder = TransformerEncoder("flow", 16, 3, 2, 0.1, local=False).train()
    packing = encoder.packing(torch.tensor([200]))
    kept = []
    for encoder.recompute in (False, True):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(torch.randn(200, 16, requires_grad=True), packing, None)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_wide_layers_are_computed_again_by_default(monkeypatch):
    """And narrow ones, and those that were told otherwise, are not."""
    monkeypatch.setattr("cellplm_scvi.nn._encoders.WIDE", 16)
    kept = {}
    for n_hidden in (8, 16):
        encoder = TransformerEncoder("flow", n_hidden, 2, 2, 0.1, local=False).train()
        packing = encoder.packing(torch.tensor([100]))
        for encoder.recompute in (None, True, False):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
                encoder(torch.randn(100, n_hidden, requires_grad=True), packing, None)
            kept[n_hidden, encoder.recompute] = sum(sizes)
    assert kept[16, None] == kept[16, True] < kept[16, False]
    assert kept[8, True] < kept[8, None] == kept[8, False]


def test_a_model_trains_the_same():
    adata = synthetic_tissues(n_samples=2, n_cells=60, n_genes=30, seed=0)
    CellPLM.setup_anndata(adata, sample_key="sample")
    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = CellPLM(adata, n_hidden=8, n_layers=2, n_heads=2, n_latent=4)
        model.train(max_epochs=2, accelerator="cpu", plan_kwargs={"recompute": recompute}, enable_progress_bar=False)
        losses.append(model.history["train_loss"].to_numpy(dtype=float))
    torch.testing.assert_close(*map(torch.from_numpy, losses), rtol=1e-5, atol=1e-5)
