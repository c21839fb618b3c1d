"""A model goes to scvi-tools' hub and comes back with the same numbers, without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData

from cellplm_scvi import CellPLM, CellPLMAnnotator

pytest.importorskip("huggingface_hub")
from scvi.hub import HubModel


def test_both_formats(dissociated_model: CellPLM, tmp_path: Path) -> None:
    made = dissociated_model.save_for_hub(
        tmp_path, license_info="cc-by-4.0", description="Of *toy* tissues.", save_anndata=True
    )
    assert made.metadata.model_parent_module == "cellplm_scvi"
    expected = dissociated_model.get_latent_representation()
    found = HubModel(str(tmp_path))
    np.testing.assert_array_equal(found.model.get_latent_representation(), expected)
    adata = dissociated_model.adata.copy()
    found.load_model(adata=adata)
    np.testing.assert_array_equal(found.model.get_latent_representation(), expected)
    by_us = CellPLM.from_pretrained(tmp_path, dissociated_model.adata.copy())
    np.testing.assert_array_equal(by_us.get_latent_representation(), expected)


def test_card(mixture_case: Any, published_data: AnnData, tmp_path: Path) -> None:
    """It has what the hub's search needs, and says how to load the model."""
    model = CellPLM.from_pretrained(mixture_case.prefix, published_data)
    model.save_for_hub(tmp_path, license_info="bsd-2-clause", references="Somebody, 2024.")
    found = HubModel(str(tmp_path))
    card = found.model_card
    assert card.data.license == "bsd-2-clause"
    assert card.data.library_name == "scvi-tools"
    assert "model_cls_name:CellPLM" in card.data.tags
    for text in ("CellPLM.from_pretrained(", "Somebody, 2024.", '"n_hidden": 32', "| n_vars | 60 |"):
        assert text in card.text
    found.load_model(adata=published_data.copy())
    np.testing.assert_array_equal(found.model.get_latent_representation(), model.get_latent_representation())


def test_card_names_the_class(dissociated_model: CellPLM, tmp_path: Path) -> None:
    annotator = CellPLMAnnotator.from_cellplm(dissociated_model, "cell_type")
    card = annotator.save_for_hub(tmp_path, license_info="mit").model_card.text
    assert "from cellplm_scvi import CellPLMAnnotator" in card
    assert "CellPLMAnnotator.from_pretrained(" in card


def test_nothing_is_replaced_unasked(dissociated_model: CellPLM, tmp_path: Path) -> None:
    dissociated_model.save_for_hub(tmp_path, license_info="mit", description="one")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        dissociated_model.save_for_hub(tmp_path, license_info="mit")
    assert "one" in HubModel(str(tmp_path)).model_card.text
    dissociated_model.save_for_hub(tmp_path, license_info="mit", description="two", overwrite=True)
    assert "two" in HubModel(str(tmp_path)).model_card.text


def test_without_the_package(dissociated_model: CellPLM, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"cellplm-scvi\[hub\]"):
        dissociated_model.save_for_hub(tmp_path / "new", license_info="mit")
    assert not (tmp_path / "new").exists()
