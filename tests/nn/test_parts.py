"""Latent spaces, masking, positions and covariates."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellplm_scvi.nn import (
    GeneEmbedder,
    GeneMasking,
    MixtureLatent,
    SparseCounts,
    TransformerEncoder,
    latent_space,
    position_code,
)
from cellplm_scvi.nn._decoder import BatchAwareDecoder, CovariateCodes


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_the_mixture_is_that_of_torch(n_components, n_latent, seed):
    torch.manual_seed(seed)
    latent = MixtureLatent(8, n_latent, n_components)
    with torch.no_grad():
        for parameter in (latent.raw_mean, latent.raw_log_variance, latent.component_logit):
            parameter.normal_()
    z = torch.randn(7, n_latent)
    centres, variances = latent.components()
    components = torch.distributions.Independent(torch.distributions.Normal(centres, variances.sqrt()), 1)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=latent.component_logit), components
    )
    mean, variance = latent.posterior(torch.randn(7, 8))
    q = torch.distributions.Normal(mean, variance.sqrt()).log_prob(z).sum(-1)
    torch.testing.assert_close(latent.divergence(z, mean, variance), q - mixture.log_prob(z), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latent.responsibilities(z).sum(1), torch.ones(7))


def test_a_mixture_of_the_standard_normal_has_the_divergence_of_one_gaussian_on_average():
    torch.manual_seed(0)
    mixture, gaussian = latent_space("mixture", 8, 3, 4), latent_space("gaussian", 8, 3, 4)
    with torch.no_grad():
        mixture.raw_mean.zero_()
    mean, variance = gaussian.posterior(torch.randn(5, 8))
    z = mixture.sample(mean, variance, 20_000)
    drawn = mixture.divergence(z, mean, variance).mean(0)
    torch.testing.assert_close(drawn, gaussian.divergence(mean, mean, variance), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["mixture", "gaussian", "deterministic"])
def test_draws_have_the_moments_of_the_posterior(kind):
    torch.manual_seed(0)
    latent = latent_space(kind, 8, 3, 4)
    mean, variance = latent.posterior(torch.randn(5, 8))
    z = latent.sample(mean, variance, 20_000)
    assert z.shape == (20_000, 5, 3)
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(z.var(0), variance, rtol=0.1, atol=0.01)
    assert latent.sample(mean, variance).shape == (5, 3)
    assert latent.divergence(z, mean, variance).shape == (20_000, 5)


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.01, 30), st.integers(0, 1000))
def test_the_mixture_has_mean_0_and_variance_1_most_of_it_inside_components(n_components, n_latent, scale, seed):
    """Wherever training drives its parameters: else components and cells move apart together."""
    torch.manual_seed(seed)
    latent = MixtureLatent(8, n_latent, n_components)
    with torch.no_grad():
        for parameter in (latent.raw_mean, latent.raw_log_variance, latent.component_logit):
            parameter.normal_().mul_(scale)
    weight = latent.component_logit.softmax(0)[:, None]
    mean, variance = latent.components()
    between = (weight * mean.square()).sum(0)
    torch.testing.assert_close((weight * mean).sum(0), torch.zeros(n_latent), rtol=0, atol=1e-5)
    torch.testing.assert_close(between + (weight * variance).sum(0), torch.ones(n_latent), rtol=1e-4, atol=1e-5)
    assert (between <= 0.2501).all()
    assert (variance > 0.01).all()


def test_components_are_set():
    """Weights as given; means and variances up to a scale and a shift a dimension, within their bounds."""
    latent = MixtureLatent(8, 2, 3)
    given_mean, given_variance = torch.tensor([[1.0, 0], [0, 1], [-1, 2]]), torch.tensor([[0.9, 1], [1, 1], [1, 1.2]])
    weight = torch.tensor([0.2, 0.3, 0.5])
    latent.set_components(given_mean, given_variance, weight)
    mean, variance = latent.components()
    torch.testing.assert_close(latent.component_logit.softmax(0), weight)
    torch.testing.assert_close(variance[1] / variance[0], given_variance[1] / given_variance[0])
    torch.testing.assert_close(
        (mean[2] - mean[0]) / (mean[1] - mean[0]), (given_mean[2] - given_mean[0]) / (given_mean[1] - given_mean[0])
    )


def test_masking_follows_its_distribution():
    torch.manual_seed(0)
    masking = GeneMasking()
    rates = masking.rates(40_000, torch.device("cpu"))
    masked = rates > 0
    assert float(masked.float().mean()) == pytest.approx(masking.cell_rate, abs=0.01)
    expected = masking.alpha / (masking.alpha + masking.beta)
    assert float(rates[masked].mean()) == pytest.approx(expected, abs=0.01)
    assert float(rates.max()) <= masking.max_rate


def test_masking_hides_counts_and_changes_no_other():
    torch.manual_seed(0)
    counts = SparseCounts(torch.arange(1.0, 401), torch.arange(400) % 20, torch.arange(0, 401, 20), 20)
    hidden = GeneMasking()(counts)
    kept = hidden.values > 0
    assert 0 < int(kept.sum()) < 400
    assert torch.equal(hidden.values[kept], counts.values[kept])
    assert torch.equal(counts.values, torch.arange(1.0, 401))


@pytest.mark.parametrize("position", ["fourier", "sinusoidal", "local", "none"])
@pytest.mark.parametrize("n_dims", [2, 3])
def test_cells_without_position_get_one_learned_vector(position, n_dims):
    torch.manual_seed(0)
    code = position_code(position, 17, n_dims)
    with torch.no_grad():
        code.no_position.normal_()
    xyz = torch.rand(6, n_dims)
    xyz[2:4] = torch.nan
    found = code(xyz)
    assert found.shape == (6, 17)
    assert torch.isfinite(found).all()
    assert torch.equal(found[2], code.no_position)
    assert torch.equal(found[2], found[3])
    if position in ("fourier", "sinusoidal"):
        assert not torch.allclose(found[0], found[1])


def test_an_encoder_that_does_not_exist():
    with pytest.raises(ValueError, match='kind="flw" is not one of "flow", "softmax", "mlp"'):
        TransformerEncoder("flw", 16, 1, 2, 0.0, local=False)


def test_a_sinusoid_needs_room():
    with pytest.raises(ValueError, match="n_hidden=4 is too small for a sinusoidal position in 3 dimensions"):
        position_code("sinusoidal", 4, 3)


@given(st.integers(1, 6), st.lists(st.integers(-3, 12), min_size=1, max_size=8))
def test_codes_outside_of_the_table_get_the_mean(n_categories, codes):
    table = CovariateCodes(n_categories, 5)
    found = table(torch.tensor(codes))
    for code, row in zip(codes, found, strict=True):
        known = 0 <= code < n_categories
        torch.testing.assert_close(row, table.weight[code] if known else table.weight.mean(0))


def test_the_decoder_starts_at_the_shares_of_the_genes():
    shares = torch.tensor([0.5, 0.3, 0.2])
    decoder = BatchAwareDecoder(2, 8, 1, 3, {"batch": 2}, gene_shares=shares).eval()
    with torch.no_grad():
        decoder.weight.zero_()
    hidden = decoder(torch.randn(4, 2), {"batch": torch.tensor([0, 1, 0, 1])})
    found = decoder.output().log_shares(hidden, None).exp()
    np.testing.assert_allclose(found.detach(), shares.expand(4, 3), rtol=1e-5)


def test_normalised_input_does_not_depend_on_depth():
    embedder = GeneEmbedder(5, 8, 1e4).eval()
    counts = SparseCounts(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 4]), torch.tensor([0, 3]), 5)
    deep = counts.with_values(counts.values * 10)
    torch.testing.assert_close(embedder(counts, counts.sum()), embedder(deep, deep.sum()))
    raw = GeneEmbedder(5, 8, None).eval()
    assert not torch.allclose(raw(counts, counts.sum()), raw(deep, deep.sum()))
    torch.testing.assert_close(raw.expression(counts, counts.sum()).values, counts.values.log1p())


@pytest.mark.parametrize("width", [64, 65, 200])
def test_bags_by_columns_are_bags_at_once(monkeypatch, width):
    """A table larger than the cache is taken in parts, to the same numbers, forwards and backwards."""
    x = sp.random(30, 40, 0.3, format="csr", random_state=0, dtype=np.float32)
    counts = SparseCounts(
        torch.from_numpy(x.data), torch.from_numpy(x.indices).long(), torch.from_numpy(x.indptr).long(), 40
    )
    table = torch.randn(40, width, requires_grad=True)
    results = []
    for entries in (1 << 30, 1):
        monkeypatch.setattr("cellplm_scvi.nn._sparse.CACHE_ENTRIES", entries)
        table.grad = None
        product = counts.matmul(table)
        product.square().sum().backward()
        results.append((product.detach(), table.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][0], torch.from_numpy(x.toarray()) @ table.detach(), rtol=1e-4, atol=1e-5)
