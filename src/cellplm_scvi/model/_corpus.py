"""What is different for a model whose cells are in a corpus on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NoReturn

from cellplm_scvi.data._streaming import CorpusDataModule
from cellplm_scvi.pretrained._own import WEIGHTS_FILE
from cellplm_scvi.pretrained._resolve import SAVED_FILE


class CorpusMixin:
    """Loads models that were trained on a corpus."""

    @classmethod
    def load(cls, dir_path: Any, adata: Any = None, *args: Any, datamodule: Any = None, **kwargs: Any) -> Any:
        """Load a model that :meth:`save` wrote; arguments as in scvi-tools.

        A model that was trained on a corpus has no AnnData: load it with ``datamodule=`` or ``adata=False``.
        """
        if (Path(dir_path) / WEIGHTS_FILE).is_file() and not any(Path(dir_path).glob(f"*{SAVED_FILE}")):
            raise FileNotFoundError(
                f'"{dir_path}" was written by save_pretrained: open it with {cls.__name__}.from_pretrained.'
            )
        if isinstance(datamodule, CorpusDataModule):  # everything about it is in the registry of the model
            adata, datamodule = False if adata is None else adata, None
        with warnings.catch_warnings():
            # genes are matched by name, in any order, and what does not match is said
            warnings.filterwarnings("ignore", message=r"`var_names` for the loaded `model` does not match")
            return super().load(dir_path, adata, *args, datamodule=datamodule, **kwargs)  # type: ignore[misc]

    @classmethod
    def setup_annbatch(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """scvi-tools' set-up of an annbatch collection, which shuffles single cells: here, cells stay with their sample.

        Raises
        ------
        NotImplementedError
            Always; it says what to call.
        """
        raise NotImplementedError(
            f"{cls.__name__} reads whole samples. Write a corpus with cellplm_scvi.data.build_corpus(sources, folder), "
            "which annbatch reads too, and train with "
            f"{cls.__name__}(registry=corpus.registry).train(datamodule=CorpusDataModule(corpus), max_epochs=...)."
        )
