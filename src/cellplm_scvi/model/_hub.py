"""Folders for the Hugging Face hub."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cellplm_scvi.pretrained import model_card

if TYPE_CHECKING:
    from scvi.hub import HubModel


class HubMixin:
    """Writes what the Hugging Face hub and scvi-tools' part of it want of a model."""

    def save_for_hub(
        self,
        folder: str | Path,
        *,
        license_info: str,
        description: str = "",
        references: str = "",
        save_anndata: bool = False,
        overwrite: bool = False,
    ) -> HubModel:
        """Write a folder to upload to the Hugging Face hub, from where both formats can be loaded.

        It holds what :meth:`save_pretrained` writes, for ``CellPLM.from_pretrained("owner/name")``, and what scvi-tools' hub
        wants: the model as :meth:`save` writes it, its metadata, and a model card.

        Parameters
        ----------
        folder
            Where to write.
        license_info
            Identifier of the licence of the weights, such as ``"cc-by-4.0"``.
        description, references
            Text for the card: what the model was trained on, and what to cite.
        save_anndata
            Whether to write the AnnData too. Without it, data have to be passed to ``HubModel.load_model``.
        overwrite
            Whether to replace a model that is there.

        Returns
        -------
        scvi-tools' handle of the folder, whose ``push_to_huggingface_hub("owner/name")`` uploads it.

        Raises
        ------
        ImportError
            Without the packages huggingface_hub and safetensors.
        FileExistsError
            If a model is there.
        """
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise ImportError('The hub needs the package huggingface_hub: pip install "cellplm-scvi[hub]".') from None
        from scvi.hub import HubMetadata, HubModel

        folder = Path(folder).expanduser()
        self.save_pretrained(folder, overwrite=overwrite)  # type: ignore[attr-defined]
        # the folder is there now, and that it may be used has just been checked
        self.save(str(folder), overwrite=True, save_anndata=save_anndata)  # type: ignore[attr-defined]
        metadata = HubMetadata.from_dir(
            str(folder), anndata_version=version("anndata"), model_parent_module=type(self).__module__.split(".")[0]
        )
        registry = self.registry_  # type: ignore[attr-defined]
        card = model_card(
            type(self).__name__,
            license_info=license_info,
            description=description,
            references=references,
            summary=f"{self._model_summary_string}.",  # type: ignore[attr-defined]
            arguments={name: v for name, v in self.init_params_["non_kwargs"].items() if v is not None},  # type: ignore[attr-defined]
            setup={name: value for name, value in registry["setup_args"].items() if value is not None},
            statistics=dict(self.summary_stats),  # type: ignore[attr-defined]
        )
        hub_model = HubModel(str(folder), metadata=metadata, model_card=card)
        hub_model.save(overwrite=True)
        return hub_model
