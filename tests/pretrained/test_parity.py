"""Our parts compute the published code's numbers from the published weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cellplm_scvi.nn import SparseCounts
from cellplm_scvi.nn._attention import GlobalAttention
from cellplm_scvi.nn.published import Draws, PublishedNetwork, ReferenceInput, ReferencePass, reference_pass
from cellplm_scvi.pretrained import load_network, read_published
from cellplm_scvi.pretrained._keys import key_table

ABSOLUTE = 1e-5
RELATIVE = 1e-5
CASES = [
    *("a_gmvae_nb_cov", "c_vae_nb", "d_ae_annotation"),
    *(
        pytest.param(f"shared:{name}", marks=pytest.mark.data)
        for name in (
            "a_gmvae_nb_cov",
            "b_gmvae_nb_nocov",
            "c_vae_nb",
            "d_ae_annotation",
            "e_embedder_subset",
            "f_cov_missing",
            "g_imputation",
        )
    ),
]
#: intermediate results of the published code that have no counterpart
NOT_COMPARED = {"dec_last_layer_before_cov", "latent.loss", "mean_by_cluster", "var_by_cluster"}
NOT_COMPARED |= {"prior_mean_by_cluster", "prior_var_by_cluster", "grad_names", "grad_norms"}


def network_of(case: Any) -> tuple[PublishedNetwork, list[str]]:
    checkpoint = read_published(case.config_path, case.checkpoint_path, overwrite=case.overwrite)
    return load_network(checkpoint), checkpoint.genes


def run(case: Any, name: str, network: PublishedNetwork, genes: list[str]) -> ReferencePass:
    arrays = {key: torch.from_numpy(value) for key, value in case.arrays.items() if value.dtype.kind != "U"}
    offsets, columns = arrays["in/x_indptr"].long(), arrays["in/x_indices"].long()
    counts = SparseCounts(arrays["in/x_data"], columns, offsets, int(case.arrays["in/x_shape"][1]))
    place = {gene: n for n, gene in enumerate(genes)}
    given = case.arrays.get("in/input_genes")
    train, masked = name == "train", name.startswith("masked")
    covariates = {key: arrays[f"in/{key}"] for key in ("batch", "dataset")}
    if name in COVARIATES.get(case.name, {}):
        covariates = {key: covariates[key] for key in COVARIATES[case.name][name]}
    measured = name.endswith("gene_mask") or (train and case.name == "g_imputation")
    which = "train" if train else "masked" if masked else "eval"
    empty = torch.empty(0)
    inputs = ReferenceInput(
        counts,
        genes=None if given is None else torch.tensor([place[gene] for gene in given]),
        mask=arrays["in/mask"] if train or masked else None,
        measured=arrays["in/gene_mask_partial"] if measured else None,
        covariates=covariates,
        label=arrays.get("in/label"),
        labelled=arrays.get("in/loss_mask"),
    )
    draws = Draws(arrays.get(f"in/U_{which}", empty), arrays.get(f"in/eps_{which}", empty))
    dae = {"masked_dae_off": False, "masked_dae_on": True, "masked_dae_off_gene_mask": False}.get(name)
    if not train:
        return reference_pass(network, inputs, draws, dae=dae)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, GlobalAttention):
            layer.dropout_rate = 0.0
    return reference_pass(network.train(), inputs, draws, train=True)


#: covariates that a pass was given, where it is not all of them
COVARIATES: dict[str, dict[str, tuple[str, ...]]] = {
    "f_cov_missing": {"eval": (), "eval_batch_only": ("batch",), "masked_dae_off": (), "masked_dae_on": ()},
    "g_imputation": {"eval_nocov": ()},
}


def close(found: Tensor, expected: np.ndarray, what: str, *, relative: float = 0.0, absolute: float = 0.0) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=relative, atol=absolute, err_msg=what)


@pytest.mark.parametrize("name", CASES)
def test_activations_and_losses(name: str, case_named: Callable[[str], Any]) -> None:
    """Every number that the case has, for every pass."""
    case = case_named(name)
    network, genes = network_of(case)
    compared = 0
    for which in case.passes:
        found = run(case, which, network, genes)
        network.eval()
        numbers = found.activations | {"loss": found.loss, "latent_loss": found.latent_loss}
        numbers |= {"target_loss": found.loss if network.decoder is None else found.loss - found.latent_loss}
        for key, expected in case.arrays.items():
            start, _, key = key.partition("/")
            if start != which or key in NOT_COMPARED or key.startswith("grad/"):
                continue
            what = f"{which}/{key}"
            if expected.ndim == 0:
                close(numbers[key], expected, what, relative=RELATIVE, absolute=1e-7)
            else:
                # means of counts and predictions are far above one
                large = key in ("dec_mean", "pred", "dec_disp")
                close(numbers[key], expected, what, absolute=ABSOLUTE, relative=RELATIVE if large else 0.0)
            compared += 1
    assert compared > 3 * len(case.passes)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, case_named: Callable[[str], Any]) -> None:
    """The gradient of the training loss with respect to every published weight."""
    case = case_named(name)
    if "train" not in case.passes:
        pytest.skip("the case has no training pass")
    network, genes = network_of(case)
    run(case, "train", network, genes).loss.backward()
    ours = dict(network.named_parameters())
    found = {}
    for key in key_table(network.config):
        if key.ours is not None and ours[key.ours].grad is not None:
            grad = ours[key.ours].grad
            assert grad is not None
            found[key.name] = grad if key.part is None else grad.chunk(3)[key.part]
    names = [str(name) for name in case.arrays["train/grad_names"]]
    assert set(names) <= set(found)
    for weight, norm in zip(names, case.arrays["train/grad_norms"], strict=True):
        np.testing.assert_allclose(found[weight].norm().item(), norm, rtol=10 * RELATIVE, atol=1e-6, err_msg=weight)
    for weight, expected in case.arrays.items():
        if weight.startswith("train/grad/"):
            grad = found[weight.removeprefix("train/grad/")]
            scale = float(np.abs(expected).max())
            close(grad, expected, weight, absolute=10 * RELATIVE * max(scale, 1e-2))


@pytest.mark.data
def test_expected_embedding(case_named: Callable[[str], Any]) -> None:
    """The mixture's posterior has the moments of the published Gaussians, weighted by q(y|h)."""
    case = case_named("shared:b_gmvae_nb_nocov")
    network, _ = network_of(case)
    arrays = case.arrays
    with torch.no_grad():
        mean, variance = network.latent.posterior(torch.from_numpy(arrays["eval/prelatent"]))
    share = arrays["eval/gm.prob_cat"].T[..., None]
    expected = (share * arrays["eval/mean_by_cluster"]).sum(0)
    close(mean, expected, "mean", absolute=ABSOLUTE)
    square = (share * (arrays["eval/var_by_cluster"] + arrays["eval/mean_by_cluster"] ** 2)).sum(0)
    close(variance, square - expected**2, "variance", absolute=ABSOLUTE)
