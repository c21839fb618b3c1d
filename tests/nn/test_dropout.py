"""Dropout by random bytes."""

import pytest
import torch

from cellplm_scvi.nn._dropout import Dropout, dropout


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_and_expectation(rate):
    """About the asked share is zero, and the rest is scaled so that the expectation is that of the input."""
    torch.manual_seed(0)
    out = dropout(torch.ones(400, 500), rate)
    assert float((out == 0).float().mean()) == pytest.approx(rate, abs=0.004)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02)
    assert out.unique().numel() == 2


@pytest.mark.parametrize("shape", [(3, 5), (1,), (2, 3, 7), (0, 4)])
def test_gradient_is_that_of_what_was_kept(shape):
    """The same entries are zero in the result and in the gradient, whatever the shape and layout."""
    x = torch.randn(shape).transpose(0, -1).requires_grad_()
    out = dropout(x, 0.4)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(out.detach(), x.detach() * x.grad)


def test_same_seed_same_entries():
    """The global generator of torch decides."""
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(torch.ones(64, 64), 0.3))
    torch.testing.assert_close(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_evaluation_mode_and_no_rate_change_nothing():
    """The very tensor comes back."""
    x = torch.randn(4, 4)
    assert Dropout(0.5).eval()(x) is x
    assert dropout(x, 0.0) is x


def test_half_precision():
    """The dtype stays."""
    assert dropout(torch.ones(8, 8, dtype=torch.bfloat16), 0.2).dtype == torch.bfloat16
