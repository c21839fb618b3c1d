"""Maps a query onto a trained reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np
import pandas as pd

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import AnnOrMuData
from cellplm_scvi.data._checks import some
from cellplm_scvi.data._fields import report_genes
from cellplm_scvi.data._vocabulary import gene_columns
from cellplm_scvi.genes._tables import Organism
from cellplm_scvi.module import PublishedModule
from cellplm_scvi.pretrained._resolve import SAVED_FILE

from ._extension import extend, unknown_categories, unseen_is_expected
from ._pretrained import check_words
from ._registry import KEY_ARGUMENTS

if TYPE_CHECKING:
    from ._cellplm import CellPLM


class QueryMixin:
    """Maps new data into the latent space of a trained model, which stays as it is."""

    @classmethod
    def load_query_data(
        cls,
        adata: AnnOrMuData,
        reference: str | Path | CellPLM,
        *,
        organism: Organism | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        **setup: Any,
    ) -> Self:
        """Map a query onto a trained reference.

        Batches, platforms and data sets of the query that the reference does not know get contributions of their own,
        which are what an unseen category contributes before training. :meth:`train` trains these alone, so that everything the
        reference says of its own data stays the same to the bit; ``train(freeze=None)`` trains all.

        Genes are matched by name, else by what the names mean, as in :meth:`from_pretrained`, whatever form the reference has.
        What the query lacks counts as not measured, and what only the query has is not used.

        Parameters
        ----------
        adata
            Query; an AnnData need not be set up, a MuData must.
        reference
            A trained model; a folder that :meth:`save` or :meth:`save_pretrained` wrote; or a published model, as in
            :meth:`from_pretrained`. A folder of :meth:`save` is read by executing it: open only what you trust.
        organism
            Whose genes the query names, as in :meth:`from_pretrained`; ``None``: what the reference was told, else human.
        accelerator, device
            Where to put the model, as in :meth:`load`.
        **setup
            Arguments of :meth:`setup_anndata` that differ from the reference's, such as ``batch_key="donor"``.

        Returns
        -------
        A model of reference and query, with ``adata``.

        Raises
        ------
        ValueError
            If the query has no category that is new to the reference.

        Examples
        --------
        >>> query = CellPLM.load_query_data(new, reference)
        >>> query.train()
        >>> new.obsm["X_cellplm"] = query.get_latent_representation()
        >>> old.obsm["X_cellplm"] = query.get_latent_representation(old)
        """
        check_words(organism=(organism or "human", get_args(Organism)))
        if isinstance(reference, str | Path) and (Path(reference) / SAVED_FILE).is_file():
            reference = cls.load(str(reference), adata=False, accelerator=accelerator, device=device)  # type: ignore[attr-defined]
        elif isinstance(reference, str | Path) and (prefixed := next(Path(reference).glob(f"*{SAVED_FILE}"), None)):
            prefix = prefixed.name.removesuffix(SAVED_FILE)
            raise ValueError(
                f'{reference} was saved with prefix="{prefix}". Load it first, and pass the model: '
                f'{cls.__name__}.load("{reference}", prefix="{prefix}", adata=False).'
            )
        with unseen_is_expected():
            model = cls._attached(reference, adata, setup, organism, accelerator=accelerator, device=device)  # type: ignore[attr-defined]
        categories = unknown_categories(model)
        if not categories:
            raise ValueError(_nothing_new(model))
        if not isinstance(model.module, PublishedModule):  # whose many genes no data have all of
            _say_genes(model)
        return extend(model, categories, [], query=True)


def _say_genes(model: CellPLM) -> None:
    """Say which genes of the reference the query lacks, and which of its own are not used."""
    state = model.adata_manager.get_state_registry(c.X_KEY)
    genes, given = pd.Index(state["column_names"]), model._gene_names(model.adata_manager)
    columns = gene_columns(state, given)
    report_genes(genes, pd.Index(np.where(columns < 0, given, genes[columns])))


def _nothing_new(model: CellPLM) -> str:
    """What to do about a query without a category of its own."""
    registry = model.registry_
    arguments = registry["setup_args"]
    keys = {name: arguments.get(KEY_ARGUMENTS[name]) for name in c.COVARIATES}
    given = {name: key for name, key in keys.items() if key is not None and key in model.adata.obs}
    if not given:
        wanted = some([key for key in keys.values() if key is not None])
        return (
            "The query has no batch of its own to train: "
            + (f"obs has no column {wanted}. " if wanted else "the reference was set up without batch_key. ")
            + 'Name the column of the query\'s batches, as in load_query_data(adata, reference, batch_key="donor").'
        )
    name, key = next(iter(given.items()))
    lacking = some([other for other in keys.values() if other is not None and other not in given.values()])
    others = f' If they have another name than {lacking}, pass it, such as batch_key="donor".' if lacking else ""
    known = registry["field_registries"][name]["state_registry"]["categorical_mapping"]
    return (
        f'The query has nothing new to train: the reference knows every category of obs["{key}"] ({some(known)}). If these '
        "are its own batches, reference.get_latent_representation(adata) embeds them as they are. If they only have the "
        f'same names, rename them first: adata.obs["{key}"] = "query " + adata.obs["{key}"].astype(str).{others}'
    )
