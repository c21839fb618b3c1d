"""The fused likelihood is the negative binomial, in value and in gradient."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scvi.distributions import NegativeBinomial

from cellplm_scvi.nn import GeneOutput, SparseCounts, nb_negative_log_likelihood, softmax_nb_loss
from cellplm_scvi.nn import _nb as nb


def sparse(dense: np.ndarray) -> SparseCounts:
    csr = sp.csr_matrix(dense.astype(np.float32))
    return SparseCounts(
        torch.from_numpy(csr.data),
        torch.from_numpy(csr.indices.astype(np.int64)),
        torch.from_numpy(csr.indptr.astype(np.int64)),
        dense.shape[1],
    )


def draw(seed: int, n_cells: int, n_genes: int, *, panels: bool, rest: bool, rate: float = 1.0):
    """Inputs of the loss, as leaves, with counts of measured genes only."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    counts = rng.poisson(rng.gamma(0.5, 2 * rate, (n_cells, n_genes)))
    measured = panel = None
    if panels:
        measured = torch.from_numpy(rng.random((3, n_genes)) < 0.6)
        measured[:, 0] = True
        panel = torch.from_numpy(rng.integers(3, size=n_cells))
        counts = counts * measured[panel].numpy()
    h = torch.randn(n_cells, 5, requires_grad=True)
    weight, bias = torch.randn(n_genes, 5, requires_grad=True), torch.randn(n_genes, requires_grad=True)
    log_theta = torch.randn(n_genes, requires_grad=True)
    library = torch.from_numpy(counts.sum(1) + rng.random(n_cells) * 5 + 0.5).float()
    share = torch.from_numpy(rng.random(n_cells)).float()
    return h, GeneOutput(weight, bias, log_theta, measured, rest), sparse(counts), counts, library, share, panel


def plain_loss(h, output, counts, library, share, panel):
    """The same through autograd and scvi-tools' distribution."""
    mu = output.log_shares(h, panel).exp() * library[:, None]
    theta = output.log_theta.exp()
    x = torch.from_numpy(counts).float()
    likelihood = NegativeBinomial(mu=mu.clamp_min(1e-30), theta=theta.expand_as(mu)).log_prob(x)
    if panel is not None:
        likelihood = likelihood.masked_fill(~output.measured[panel], 0.0)
    each = -likelihood.sum(1)
    return (share * each).sum(), each


shapes = st.tuples(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 15))


@settings(max_examples=40)
@given(shapes, st.booleans(), st.booleans(), st.sampled_from([0.01, 1.0, 100.0]))
def test_loss_and_gradient_are_those_of_the_distribution(shape, panels, rest, rate):
    h, output, sparse_counts, counts, library, share, panel = draw(*shape, panels=panels, rest=rest, rate=rate)
    leaves = [h, output.weight, output.bias, output.log_theta]
    expected, each = plain_loss(h, output, counts, library, share, panel)
    expected_grads = torch.autograd.grad(expected, leaves)
    found, found_each = softmax_nb_loss(h, sparse_counts, library, output, share, panel)
    # scvi-tools adds 1e-8 inside of its logarithms
    torch.testing.assert_close(found_each, each.detach(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    assert not found_each.requires_grad
    for ours, theirs in zip(torch.autograd.grad(3 * found, leaves), expected_grads, strict=True):
        torch.testing.assert_close(ours / 3, theirs, rtol=2e-3, atol=2e-3 * max(1.0, float(theirs.abs().max())))


@settings(max_examples=10)
@given(shapes, st.booleans(), st.booleans())
def test_chunks_do_not_matter(shape, panels, rest):
    h, output, sparse_counts, _, library, share, panel = draw(*shape, panels=panels, rest=rest)
    leaves = [h, output.weight, output.bias, output.log_theta]

    def run() -> list[torch.Tensor]:
        loss, each = softmax_nb_loss(h, sparse_counts, library, output, share, panel)
        return [loss, each, *torch.autograd.grad(loss, leaves)]

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nb.CHUNK_ENTRIES, "cpu", 2 * output.weight.shape[0])
        for one, other in zip(run(), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_slopes_by_finite_differences():
    """In float64 by way of the elementwise likelihood, which the fused one equals (above)."""
    torch.manual_seed(0)
    x = torch.tensor([[0.0, 1.0, 7.0]], dtype=torch.float64)

    def loss(logits: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
        return nb_negative_log_likelihood(x, logits.softmax(-1) * 9.0, log_theta.exp())

    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    log_theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (logits, log_theta))


@given(st.floats(0.01, 1e3), st.floats(0.05, 1e3))
def test_elementwise_likelihood_sums_to_one_over_counts(mu, theta):
    x = torch.arange(200_000, dtype=torch.float64)
    log_p = -nb_negative_log_likelihood(
        x, torch.tensor(mu, dtype=torch.float64), torch.tensor(theta, dtype=torch.float64)
    )
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-3)


def test_cells_without_counts_have_the_likelihood_of_zeros():
    h, output, _, _, library, share, _ = draw(0, 3, 6, panels=False, rest=False)
    zeros = np.zeros((3, 6))
    loss, each = softmax_nb_loss(h, sparse(zeros), library, output, share)
    torch.testing.assert_close(
        each, plain_loss(h, output, zeros, library, share, None)[1].detach(), rtol=1e-3, atol=1e-3
    )
    nothing, _ = softmax_nb_loss(h, sparse(zeros), torch.zeros(3), output, share)
    grads = torch.autograd.grad(nothing, [h, output.weight, output.log_theta])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert float(nothing.detach()) == pytest.approx(0.0, abs=1e-4)


def test_genes_that_were_not_measured_do_not_matter():
    h, output, counts, _, library, share, panel = draw(1, 8, 10, panels=True, rest=False)
    loss, _ = softmax_nb_loss(h, counts, library, output, share, torch.zeros_like(panel))
    hidden = ~output.measured[0]
    counts.values[hidden[counts.genes]] = 0  # entries outside of panel 0
    changed = GeneOutput(
        output.weight.detach().clone(), output.bias.detach().clone(), output.log_theta.detach().clone(), output.measured
    )
    changed.weight[hidden] += 5
    changed.log_theta[hidden] -= 2
    share_a = output.log_shares(h, torch.zeros_like(panel)).detach()
    torch.testing.assert_close(changed.log_shares(h, torch.zeros_like(panel)).detach(), share_a)
    assert (share_a.exp()[:, hidden] == 0).all()
    torch.testing.assert_close(share_a.exp().sum(1), torch.ones(8))


@given(shapes)
def test_sparse_counts(shape):
    rng = np.random.default_rng(shape[0])
    dense = rng.poisson(0.5, shape[1:])
    counts = sparse(dense)
    np.testing.assert_array_equal(counts.to_dense(), dense)
    np.testing.assert_array_equal(counts.sum(), dense.sum(1))
    table = torch.randn(shape[2], 3, requires_grad=True)
    product = counts.matmul(table)
    torch.testing.assert_close(product, torch.from_numpy(dense).float() @ table, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(product)
    (grad,) = torch.autograd.grad((product * weights).sum(), table)
    torch.testing.assert_close(grad, torch.from_numpy(dense).float().T @ weights, rtol=1e-4, atol=1e-4)
    keep = torch.from_numpy(rng.random(shape[1]) < 0.5)
    np.testing.assert_array_equal(counts.select(keep).to_dense(), dense[keep.numpy()])
