"""Arguments of the command ``cellplm``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cellplm_scvi.data._corpus import Corpus
from cellplm_scvi.data._corpus_build import build_corpus
from cellplm_scvi.genes._tables import Organism

from ._embed import embed
from ._pretrain import pretrain

#: kinds of errors whose message says what to mend; others keep their traceback
USER_ERRORS = (OSError, KeyError, ValueError, TypeError, ImportError, MisconfigurationException)


def build(
    path: str,
    sources: list[str],
    genes: str | None = None,
    layer: str | None = None,
    batch_key: str | None = None,
    platform_key: str | None = None,
    dataset_key: str | None = None,
    sample_key: str | None = None,
    spatial_key: str | None = None,
    size_factor_key: str | None = None,
    measured_genes_key: str | None = None,
    organism: Organism = "human",
    shard_size: int = 16_384,
) -> None:
    """Write data sets as a corpus, or go on with it after a kill.

    Parameters
    ----------
    path
        Folder to write.
    sources
        Paths of .h5ad files and .zarr folders.
    genes
        File with the vocabulary, a gene a line; by default the union of all genes.
    layer
        Layer that holds the counts.
    batch_key
        Column of obs with the batch.
    platform_key
        Column of obs with the platform.
    dataset_key
        Column of obs with the data set; by default each source is one.
    sample_key
        Column of obs with the tissue sample; by default each batch is one.
    spatial_key
        Key of obsm with coordinates.
    size_factor_key
        Column of obs with the library size over all genes.
    measured_genes_key
        Key of varm with the genes that each data set measured.
    organism
        Whose genes the sources name, "human" or "mouse".
    shard_size
        Cells of a shard.
    """
    if genes is not None and not Path(genes).is_file():
        raise FileNotFoundError(f"There is no file {genes} of genes. It holds the vocabulary, a gene a line.")
    vocabulary = None if genes is None else Path(genes).read_text(encoding="utf-8").split()
    corpus = build_corpus(
        sources,
        path,
        genes=vocabulary,
        shard_size=shard_size,
        layer=layer,
        batch_key=batch_key,
        platform_key=platform_key,
        dataset_key=dataset_key,
        sample_key=sample_key,
        spatial_key=spatial_key,
        size_factor_key=size_factor_key,
        measured_genes_key=measured_genes_key,
        organism=organism,
    )
    print(corpus)


def info(path: str, verify: bool = True) -> None:
    """Describe a corpus.

    Parameters
    ----------
    path
        Its folder.
    verify
        Whether to read every file, and to compare it with its checksum.
    """
    corpus = Corpus(path)
    print(corpus)
    for name, value in corpus.info().items():
        text = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
        print(f"  {name.replace('_', ' ')}: {text}")
    if verify:
        corpus.verify()
        print("  checksums: all files are as they were written; no cell is missing or there twice")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with what the user gave is said in a line, with exit code 2."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        raise SystemExit('The command needs the package jsonargparse: pip install "cellplm-scvi[corpus]".') from None
    given = list(sys.argv[1:] if args is None else args)
    parser = ArgumentParser(prog="cellplm", description="Pre-training and embedding of cells, from disk.")
    commands = parser.add_subcommands(required=True, dest="command")
    corpus = ArgumentParser(description="Build or describe a corpus on disk.")
    commands.add_subcommand("corpus", corpus)
    actions = corpus.add_subcommands(required=True, dest="action")
    builder = _parser(ArgumentParser, build, as_positional=True, skip={"sources"})
    builder.add_argument("sources", nargs="+", type=str, help="Paths of .h5ad files and .zarr folders.")
    actions.add_subcommand("build", builder)
    actions.add_subcommand("info", _parser(ArgumentParser, info, as_positional=True))
    commands.add_subcommand("pretrain", _parser(ArgumentParser, pretrain, skip={"callbacks"}))
    commands.add_subcommand("embed", _parser(ArgumentParser, embed, as_positional=True))
    if len(given) > 1 and given[0] == "pretrain" and not given[1].startswith("-"):
        given.insert(1, "--config")
    found: Any = parser.parse_args(given)
    chosen: Any = found[found.command]
    functions: dict[str, Any] = {"build": build, "info": info, "pretrain": pretrain, "embed": embed}
    function = functions[found.command if found.command != "corpus" else chosen.action]
    if found.command == "corpus":
        chosen = chosen[chosen.action]
    arguments = chosen.as_dict()
    arguments.pop("config", None)
    try:
        function(**arguments)
    except USER_ERRORS as error:
        # the text of a KeyError is the repr of its message
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"cellplm: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser(parser_class: Any, function: Any, *, as_positional: bool = False, skip: set[str] | None = None) -> Any:
    parser = parser_class(description=function.__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file with these arguments.")
    parser.add_function_arguments(function, as_positional=as_positional, skip=skip or set())
    return parser
