"""Attention of packed samples is that of each sample alone, and that of the formulas written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cellplm_scvi.nn._attention import (
    FlowAttention,
    GlobalAttention,
    LocalAttention,
    Neighbourhood,
    Packing,
    SoftmaxAttention,
)
from cellplm_scvi.nn._flow import flow_attention as one_flow_attention
from cellplm_scvi.nn._flow import flow_attention_of_pairs

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def rows(n: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@given(lengths)
def test_blocks_keep_every_row_and_never_mix_samples(sizes):
    packing = Packing(torch.tensor(sizes))
    x = rows(sum(sizes))
    blocks = packing.to_blocks(x)
    assert torch.equal(packing.from_blocks(blocks), x)
    assert torch.allclose(blocks.sum((0, 1)), x.sum(0), atol=1e-4)
    if len(sizes) > 1:
        sample = packing.to_blocks(packing.segment[:, None] + 1).squeeze(-1)
        for block, owner in zip(sample, packing.block_sample, strict=True):
            assert set(block[block > 0].tolist()) == {int(owner) + 1}


@given(lengths)
def test_sums_and_softmax_over_samples(sizes):
    packing = Packing(torch.tensor(sizes))
    x = rows(sum(sizes))
    parts = x.split(sizes)
    assert torch.allclose(packing.sum(x), torch.stack([part.sum(0) for part in parts]), atol=1e-4)
    assert torch.allclose(packing.softmax(x), torch.cat([part.softmax(0) for part in parts]), atol=1e-6)
    index, real, places = packing.padded
    assert torch.equal(x[index][real], x)
    assert torch.equal(x[index].flatten(0, 1)[places], x)
    assert real.sum(1).tolist() == sizes


@settings(max_examples=25)
@given(lengths, st.sampled_from([FlowAttention, SoftmaxAttention]), st.integers(0, 1000))
def test_packed_samples_attend_as_if_alone(sizes, kind, seed):
    torch.manual_seed(seed)
    attention = kind(8, 2).eval()
    x = rows(sum(sizes), seed=seed)
    packed = attention(x, Packing(torch.tensor(sizes)))
    alone = torch.cat([attention(part, Packing(torch.tensor([len(part)]))) for part in x.split(sizes)])
    assert torch.allclose(packed, alone, atol=1e-5)


def flow_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """Flowformer (Wu et al. 2022) written out with a table of cells x cells, one head, one sample."""
    q, k = q.sigmoid(), k.sigmoid()
    incoming = (q + eps) @ (k.sum(0) + eps)
    outgoing = (k + eps) @ (q.sum(0) + eps)
    conserved_in = (q + eps) @ ((k / outgoing[:, None]).sum(0) + eps)
    conserved_out = ((k + eps) @ ((q / incoming[:, None]).sum(0) + eps)).clamp(-1, 1)
    competition = conserved_out.softmax(0) * len(q)
    weights = (q / incoming[:, None]) @ k.T  # cells x cells
    return conserved_in.sigmoid()[:, None] * (weights @ (competition[:, None] * v))


@settings(max_examples=25)
@given(lengths, st.integers(0, 1000))
def test_flow_attention_is_the_formula(sizes, seed):
    torch.manual_seed(seed)
    attention = FlowAttention(8, 2).eval()
    x = 2 * rows(sum(sizes), seed=seed)
    q, k, v = attention.heads(attention.qkv(x))
    found = attention.attend(q, k, v, Packing(torch.tensor(sizes)))
    for head in range(2):
        parts = zip(*(t[:, head].split(sizes) for t in (q, k, v)), strict=True)
        expected = torch.cat([flow_attention(*part) for part in parts])
        assert torch.allclose(found[:, head], expected, atol=1e-5)


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from([0.5, 3.0]))
def test_flow_attention_of_one_sample_is_that_of_packed_ones_with_all_gradients(n, seed, scale):
    """What a CPU computes in one go, against automatic differentiation of :meth:`FlowAttention.attend`."""
    torch.manual_seed(seed)
    attention, packing = FlowAttention(12, 3), Packing(torch.tensor([n]))
    torch.nn.init.normal_(attention.out.bias)

    def results(function):
        attention.zero_grad()
        x = (scale * rows(n, 12, seed)).requires_grad_()
        mixed = function(x)
        mixed.backward(rows(n, 12, seed + 1))
        return [mixed.detach(), x.grad, *(p.grad for p in attention.parameters())]

    found = results(lambda x: one_flow_attention(x, attention.qkv, attention.out, 3))
    expected = results(lambda x: GlobalAttention.mix(attention, x, packing))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradient_of_flow_attention_of_one_sample_where_only_some_is_asked_for():
    torch.manual_seed(0)
    attention = FlowAttention(6, 2).double()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def mix(x, weight):
        return one_flow_attention(x, SimpleNamespace(weight=weight, bias=attention.qkv.bias), attention.out, 2)

    weight = attention.qkv.weight.detach()
    assert torch.autograd.gradcheck(mix, (x, weight))
    assert torch.autograd.gradcheck(mix, (x.detach(), weight.clone().requires_grad_()))


@settings(max_examples=25)
@given(lengths, st.integers(0, 1000), st.sampled_from([0.5, 5.0]))
def test_flow_attention_of_pairs_is_that_of_packed_samples_with_its_gradient(sizes, seed, scale):
    """What a CPU computes for few cells, against automatic differentiation of :meth:`FlowAttention.attend`."""
    attention, packing = FlowAttention(12, 3), Packing(torch.tensor(sizes))
    qkv = (scale * rows(sum(sizes), 36, seed)).requires_grad_()
    found = flow_attention_of_pairs(qkv, packing.same, 3)
    expected = attention.attend(*attention.heads(qkv), packing).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(mixed, qkv, rows(sum(sizes), 12, seed + 1))[0] for mixed in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_gradient_of_flow_attention_of_pairs():
    torch.manual_seed(0)
    same = Packing(torch.tensor([3, 1, 4])).same
    qkv = torch.randn(8, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv: flow_attention_of_pairs(qkv, same, 2), (qkv,))


def test_few_cells_of_several_samples_are_trained_by_pairs_and_all_others_by_samples(monkeypatch):
    """Both give the same, to rounding; an embedding is always computed by samples, whatever lies beside."""
    attention, x, packing = FlowAttention(12, 3), rows(30, 12), Packing(torch.tensor([10, 1, 19]))
    few = attention(x, packing)
    monkeypatch.setattr("cellplm_scvi.nn._attention.flow_attention_of_pairs", None)
    torch.testing.assert_close(attention.eval()(x, packing), few, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("cellplm_scvi.nn._attention.FEW_CELLS", 29)
    torch.testing.assert_close(attention.train()(x, packing), few, rtol=1e-5, atol=1e-6)


def test_flow_attention_of_one_sample_in_half_precision():
    """Products are bfloat16, so results are near, with gradients in float32.

    Cells are alike, so that sums over them grow, and would lose small terms if they were added up in bfloat16.
    """
    torch.manual_seed(0)
    attention, x, weight = FlowAttention(32, 4), (1 + rows(3000, 32)).requires_grad_(), rows(3000, 32, seed=1)

    def results(enabled):
        attention.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            mixed = attention(x, Packing(torch.tensor([3000])))
        (mixed.float() * weight).mean().backward()
        return mixed, [x.grad, *(p.grad for p in attention.parameters())]

    (half, half_grads), (full, full_grads) = results(True), results(False)
    assert half.dtype == torch.bfloat16
    for one, other in zip([half.float(), *half_grads], [full, *full_grads], strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


@given(lengths, st.integers(0, 1000))
def test_softmax_attention_is_the_formula(sizes, seed):
    torch.manual_seed(seed)
    attention = SoftmaxAttention(8, 2).eval()
    q, k, v = attention.heads(attention.qkv(2 * rows(sum(sizes), seed=seed)))
    found = attention.attend(q, k, v, Packing(torch.tensor(sizes)))
    for head in range(2):
        parts = zip(*(t[:, head].split(sizes) for t in (q, k, v)), strict=True)
        expected = torch.cat([(a @ b.T / a.shape[1] ** 0.5).softmax(1) @ c for a, b, c in parts])
        assert torch.allclose(found[:, head], expected, atol=1e-5)


@pytest.mark.parametrize("kind", [FlowAttention, SoftmaxAttention])
def test_attention_mixes_the_cells_of_a_sample_only(kind):
    attention = kind(8, 2).eval()
    x = rows(12).requires_grad_()
    attention(x, Packing(torch.tensor([5, 7])))[2].sum().backward()
    moved = x.grad.abs().sum(1)
    assert (moved[:5] > 0).all()
    assert (moved[5:] == 0).all()


@pytest.mark.parametrize("kind", [FlowAttention, SoftmaxAttention])
def test_heads_must_divide_the_width(kind):
    with pytest.raises(ValueError, match=r"n_hidden \(10\) must be a multiple of n_heads \(4\)"):
        kind(10, 4)


def neighbourhood(n: int, k: int, seed: int) -> Neighbourhood:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, max(n, 1), (n, k), generator=generator)
    return Neighbourhood(index, torch.rand(n, k, generator=generator) * 3)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_local_attention_is_the_formula(n, k, seed):
    torch.manual_seed(seed)
    attention = LocalAttention(8, 2).eval()
    x, near = rows(n, seed=seed), neighbourhood(n, k, seed)
    found = attention(x, near)
    q, keys, v = attention.heads(attention.qkv(x))
    mixed = torch.zeros(n, 2, 4)
    for cell in range(n):
        present = near.index[cell] >= 0
        others, far = near.index[cell][present], near.distance[cell][present]
        if len(others):
            for head in range(2):
                logits = keys[others, head] @ q[cell, head] / 2 - far * attention.log_slope[head].exp()
                mixed[cell, head] = logits.softmax(0) @ v[others, head]
    assert torch.allclose(found, attention.out(mixed.flatten(1)), atol=1e-5)


@pytest.mark.parametrize("n_cells", [0, 1, 13])
def test_local_attention_by_parts_is_that_of_the_whole(n_cells, monkeypatch):
    attention = LocalAttention(8, 2).eval()
    x, near = rows(n_cells), neighbourhood(n_cells, 3, 0)
    whole = attention(x, near)
    monkeypatch.setattr("cellplm_scvi.nn._attention.CACHE_ENTRIES", 4 * 3 * 8 * 2)  # two cells at a time
    with torch.no_grad():
        assert torch.equal(attention(x, near), whole)


@given(st.integers(2, 20), st.integers(1, 6), st.integers(0, 1000))
def test_local_attention_does_not_depend_on_the_order_of_neighbours_or_absent_ones(n, k, seed):
    torch.manual_seed(seed)
    attention = LocalAttention(8, 2).eval()
    x, near = rows(n, seed=seed), neighbourhood(n, k, seed)
    order = torch.randperm(k)
    shuffled = Neighbourhood(near.index[:, order], near.distance[:, order])
    assert torch.allclose(attention(x, shuffled), attention(x, near), atol=1e-5)
    padded = Neighbourhood(
        torch.cat([near.index, torch.full((n, 3), -1)], 1), torch.cat([near.distance, torch.rand(n, 3)], 1)
    )
    assert torch.allclose(attention(x, padded), attention(x, near), atol=1e-5)
    far = Neighbourhood(near.index, near.distance + 1.7)  # a common distance cancels
    assert torch.allclose(attention(x, far), attention(x, near), atol=1e-4)


def test_local_attention_prefers_near_cells():
    attention = LocalAttention(8, 1).eval()
    with torch.no_grad():
        attention.qkv.weight[:16] = 0
        attention.qkv.bias[:16] = 0
    x = rows(3)
    _, _, v = attention.heads(attention.qkv(x))
    near = Neighbourhood(torch.tensor([[1, 2]] * 3), torch.tensor([[0.0, 50.0]] * 3))
    assert torch.allclose(attention(x, near)[0], attention.out(v[1].flatten()), atol=1e-5)
