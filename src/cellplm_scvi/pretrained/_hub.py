"""A model card, as scvi-tools' hub wants one beside a saved model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ._own import plain

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = """---
{header}
---

# {name}

{description}

A [CellPLM](https://github.com/cellplm-scvi/cellplm-scvi) model: a transformer whose tokens are cells and whose sentences are
tissue samples. {summary}

## How to load it

Without running anything that is in the files:

```python
from cellplm_scvi import {name}

model = {name}.from_pretrained("OWNER/NAME", adata)  # raw counts
adata.obsm["X_cellplm"] = model.get_latent_representation()
```

With scvi-tools' hub, which reads a pickle: do so only if you trust its origin.

```python
from scvi.hub import HubModel

hub_model = HubModel.pull_from_huggingface_hub("OWNER/NAME")
hub_model.load_model(adata=adata)
```

## Set-up of its data

```json
{setup}
```

## Numbers of its data

| | |
| --- | ---: |
{statistics}

## Arguments of the model

```json
{arguments}
```

## Versions

cellplm-scvi {package}, scvi-tools {scvi}, anndata {anndata}

## References

Wen et al., CellPLM: Pre-training of Cell Language Model Beyond Single Cells. ICLR 2024.
{references}
"""


def model_card(
    name: str,
    *,
    license_info: str,
    description: str,
    references: str,
    summary: str,
    arguments: Mapping[str, Any],
    setup: Mapping[str, Any],
    statistics: Mapping[str, int],
) -> ModelCard:
    """Write a card from what is known of a model.

    Parameters
    ----------
    name
        Name of its class.
    license_info
        Identifier of a licence, such as ``"cc-by-4.0"``.
    description, references, summary
        Markdown.
    arguments, setup
        Of its constructor and of ``setup_anndata``.
    statistics
        Counts of cells, genes and categories.
    """
    from huggingface_hub import ModelCard, ModelCardData

    versions = {package: version(package) for package in ("scvi-tools", "anndata")}
    tags = ["biology", "genomics", "single-cell", f"model_cls_name:{name}", f"scvi_version:{versions['scvi-tools']}"]
    tags += [f"anndata_version:{versions['anndata']}", "modality:rna"]
    header = ModelCardData(license=license_info, library_name="scvi-tools", tags=tags)
    content = CARD.format(
        header=header.to_yaml(),
        name=name,
        description=description,
        summary=summary,
        setup=json.dumps(setup, default=plain, indent=4),
        statistics="\n".join(f"| {key} | {number:,} |" for key, number in statistics.items()),
        arguments=json.dumps(arguments, default=plain, indent=4),
        package=version("cellplm-scvi"),
        scvi=versions["scvi-tools"],
        anndata=versions["anndata"],
        references=references,
    )
    return ModelCard(content)
