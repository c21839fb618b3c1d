"""The fused likelihood is the negative binomial, in value and in gradient."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scvi.distributions import NegativeBinomial
from torch.utils.flop_counter import FlopCounterMode

from cellplm_scvi.nn import GeneOutput, SparseCounts, nb_expected_log1p, nb_negative_log_likelihood, softmax_nb_loss
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


def leaves_of(h, output):
    return [h, output.weight, output.bias, output.log_theta]


def plain_loss(h, output, counts, library, share, panel, entry_weight=None):
    """The same, dense and elementwise, through autograd in float64; ``entry_weight`` (n_cells, n_genes)."""
    logits = h.double() @ output.weight.double().T + output.bias.double()
    if panel is not None:
        logits = logits.masked_fill(~output.measured[panel], -torch.inf)
    log_share = logits - nb.log_total(logits, output.rest)
    mu = (log_share.exp() * library.double()[:, None]).clamp_min(1e-300)
    x = torch.from_numpy(counts).double()
    likelihood = nb_negative_log_likelihood(x, mu, output.log_theta.double().exp().expand_as(mu))
    if panel is not None:
        likelihood = likelihood.masked_fill(~output.measured[panel], 0.0)
    each = (likelihood if entry_weight is None else likelihood * entry_weight).sum(1)
    return (share * each).sum(), each


shapes = st.tuples(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 15))


@settings(max_examples=40)
@given(shapes, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.01, 1.0, 100.0]))
def test_loss_and_gradient_are_those_of_the_dense_likelihood(shape, panels, rest, weighted, rate):
    h, output, sparse_counts, counts, library, share, panel = draw(*shape, panels=panels, rest=rest, rate=rate)
    entry_weight = dense_weight = None
    if weighted:
        dense_weight = torch.where(torch.from_numpy(counts) > 0, torch.rand(counts.shape) * 3, 1.0)
        entry_weight = dense_weight[sparse_counts.rows, sparse_counts.genes]
    leaves = leaves_of(h, output)
    expected, each = plain_loss(h, output, counts, library, share, panel, dense_weight)
    found, found_each = softmax_nb_loss(h, sparse_counts, library, output, share, panel, entry_weight)
    # gamma functions of large counts cancel: float32 rounds the terms, not their difference
    rounding = 3e-6 * (100 + float(counts.sum()))
    torch.testing.assert_close(found_each.double(), each.detach(), rtol=1e-5, atol=rounding)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=rounding)
    assert not found_each.requires_grad
    expected_grads = torch.autograd.grad(expected, leaves)
    for ours, theirs in zip(torch.autograd.grad(3 * found, leaves), expected_grads, strict=True):
        torch.testing.assert_close(ours / 3, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("frozen", [False, True], ids=["no grad", "frozen"])
def test_without_gradient_the_same_loss_for_the_work_of_one_pass(frozen):
    h, output, sparse_counts, _, library, share, panel = draw(0, 40, 30, panels=True, rest=True)
    with FlopCounterMode(display=False) as of_both:
        expected, expected_each = softmax_nb_loss(h, sparse_counts, library, output, share, panel)
    for leaf in leaves_of(h, output):
        leaf.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as of_one, torch.set_grad_enabled(frozen):
        found, each = softmax_nb_loss(h, sparse_counts, library, output, share, panel)
    assert of_one.get_total_flops() == 2 * output.weight.numel() * h.shape[0] < of_both.get_total_flops() / 2
    torch.testing.assert_close((found, each), (expected.detach(), expected_each), rtol=0, atol=0)
    assert not found.requires_grad


@given(shapes, st.booleans())
def test_likelihood_is_that_of_the_distributions(shape, panels):
    """Of scvi-tools and of torch, which add or clamp small numbers: compared where no mean is tiny."""
    h, output, sparse_counts, counts, library, share, panel = draw(*shape, panels=panels, rest=False)
    with torch.no_grad():
        h *= 0.2
        output.bias.zero_()
    _, each = softmax_nb_loss(h, sparse_counts, library, output, share, panel)
    mu = (output.log_shares(h, panel).exp() * library[:, None]).detach()
    theta = output.log_theta.detach().exp().expand_as(mu)
    x = torch.from_numpy(counts).float()
    for likelihood in (
        NegativeBinomial(mu=mu.clamp_min(1e-30), theta=theta).log_prob(x),
        torch.distributions.NegativeBinomial(
            theta, probs=(mu / (mu + theta)).clamp_max(1 - 1e-6), validate_args=False
        ).log_prob(x),
    ):
        here = likelihood if panel is None else likelihood.masked_fill(~output.measured[panel], 0.0)
        torch.testing.assert_close(each, -here.sum(1), rtol=1e-3, atol=1e-2)


def test_gradient_of_the_fused_loss_by_finite_differences():
    h, output, sparse_counts, _, library, share, panel = draw(3, 3, 4, panels=True, rest=True)

    def loss(*leaves):
        return softmax_nb_loss(
            leaves[0], sparse_counts, library, GeneOutput(*leaves[1:], output.measured, True), share, panel
        )[0]

    # float32 inside: a coarse step and tolerance
    assert torch.autograd.gradcheck(loss, leaves_of(h, output), eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_lose_no_more_than_their_rounding(dtype):
    h, output, sparse_counts, _, library, share, _ = draw(5, 6, 9, panels=False, rest=False)
    rounded = h.detach().to(dtype)
    loss, _ = softmax_nb_loss(rounded.requires_grad_(), sparse_counts, library, output, share)
    same, _ = softmax_nb_loss(rounded.detach().float(), sparse_counts, library, output, share)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, same)
    (grad,) = torch.autograd.grad(loss, [rounded])
    assert grad.dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("panels", [False, True])
def test_loss_and_gradient_are_the_same_on_a_gpu(panels):
    h, output, counts, _, library, share, panel = draw(7, 40, 60, panels=panels, rest=True)

    def run(device: str) -> list[torch.Tensor]:
        here = [t.detach().to(device).requires_grad_() for t in leaves_of(h, output)]
        measured = None if output.measured is None else output.measured.to(device)
        values, genes, offsets = (t.to(device) for t in (counts.values, counts.genes, counts.offsets))
        moved = SparseCounts(values, genes, offsets, counts.n_genes)
        out = GeneOutput(here[1], here[2], here[3], measured, True)
        loss, _ = softmax_nb_loss(
            here[0], moved, library.to(device), out, share.to(device), None if panel is None else panel.to(device)
        )
        return [t.cpu() for t in (loss, *torch.autograd.grad(loss, here))]

    for one, other in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


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
        patch.setattr(nb, "MIN_CHUNK_ROWS", 1)
        for one, other in zip(run(), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_differences_of_gamma_functions():
    """Against SciPy in double precision, from theta so small to so large that the functions themselves would cancel."""
    log_theta, x = torch.linspace(-12, 16, 57)[:, None], torch.tensor([0.0, 1, 2, 3, 10, 100, 1e4, 1e6])
    theta = log_theta.exp().expand(-1, 8)
    found, slope = nb.gamma_differences(x.expand_as(theta), theta)
    exact, above = theta.double().numpy(), (theta.double() + x).numpy()
    expected = torch.from_numpy(special.gammaln(above) - special.gammaln(exact))
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-5)
    expected = torch.from_numpy(special.digamma(above) - special.digamma(exact))
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-12)
    assert nb.gamma_differences(x.expand_as(theta), theta, slope=False)[1] is None


@pytest.mark.parametrize("log_theta", [-10.0, -5.0, 10.0, 14.0, 18.0])
@pytest.mark.parametrize("largest", [3, 800_000])
def test_dispersions_at_both_ends(log_theta, largest):
    """The gradient is right where a gene is all bursts, or Poisson, and so is the loss."""
    counts = np.array([[largest, max(1, largest // 8), 0], [1, 0, 2]])
    h, output, *_ = draw(0, 2, 3, panels=False, rest=False)
    with torch.no_grad():
        output.log_theta.fill_(log_theta)
    library, share = torch.from_numpy(counts.sum(1)).float(), torch.ones(2)
    leaves = leaves_of(h, output)
    expected, each = plain_loss(h, output, counts, library, share, None)
    found, found_each = softmax_nb_loss(h, sparse(counts), library, output, share)
    torch.testing.assert_close(found_each.double(), each.detach(), rtol=1e-4, atol=3e-6 * (1 + largest))
    # where a gene is Poisson, its dispersion has no gradient to speak of
    rounding = 3e-7 * (1 + largest) if log_theta > 0 else 0.0
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + rounding)


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
        each, plain_loss(h, output, zeros, library, share, None)[1].detach().float(), rtol=1e-4, atol=1e-4
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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 1e4])
def test_expected_log1p_is_the_sum_over_counts(scale):
    """Quadrature against the sum of log1p times probability, from means far below one to hundreds."""
    mean = torch.tensor([1e-5, 1e-3, 0.1, 1.0, 7.0, 300.0])[:, None]
    theta = torch.tensor([0.05, 1.0, 20.0])
    x = torch.arange(60_000, dtype=torch.float64)[:, None, None]
    log_p = -nb_negative_log_likelihood(x, mean.double(), theta.double())
    expected = (log_p.exp() * torch.log1p(scale * x)).sum(0)
    found = nb_expected_log1p(mean, theta.expand(6, 3), torch.tensor(scale))
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)
