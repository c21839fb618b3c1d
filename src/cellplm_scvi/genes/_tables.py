"""The shipped gene tables, read once and indexed by every name a gene goes by.

The files, their sources and licences are described in ``tables/SOURCES.md``.
"""

import gzip
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Literal, NamedTuple

Organism = Literal["human", "mouse"]

HUMAN_FILE = "hgnc.tsv.gz"
HUMAN_COLUMNS = ("symbol", "ensembl_gene_id", "prev_symbol", "alias_symbol")
MOUSE_FILE = "mouse_orthologues.tsv.gz"
MOUSE_COLUMNS = ("mouse_ensembl", "mouse_symbol", "human_ensembl")


class Gene(NamedTuple):
    """A human gene: its approved symbol, and its Ensembl id where HGNC knows one."""

    symbol: str
    ensembl: str | None


class NameIndex:
    """From a name to the genes that bear it, exactly or with the case ignored.

    Parameters
    ----------
    pairs
        (name, gene) pairs; a name may come with several genes.
    """

    def __init__(self, pairs: Iterable[tuple[str, Gene]]) -> None:
        self._exact: defaultdict[str, list[Gene]] = defaultdict(list)
        for name, gene in pairs:
            if name and gene not in self._exact[name]:
                self._exact[name].append(gene)

    @cached_property
    def _folded(self) -> dict[str, list[Gene]]:
        folded: defaultdict[str, dict[Gene, None]] = defaultdict(dict)
        for name, genes in self._exact.items():
            folded[name.upper()].update(dict.fromkeys(genes))
        return {name: list(genes) for name, genes in folded.items()}

    def exact(self, name: str) -> list[Gene]:
        """Genes that bear this name."""
        return self._exact.get(name, [])

    def folded(self, name: str) -> list[Gene]:
        """Genes that bear this name in whatever case."""
        return self._folded.get(name.upper(), [])


@dataclass(frozen=True, slots=True)
class GeneTable:
    """The names by which the genes of one organism are found; what is found is always a human gene."""

    id_prefix: str
    ensembl: NameIndex
    symbol: NameIndex
    previous: NameIndex = field(default_factory=lambda: NameIndex(()))
    alias: NameIndex = field(default_factory=lambda: NameIndex(()))


@cache
def gene_table(organism: Organism) -> GeneTable:
    """Return the index of an organism's gene names, read from disk on the first call."""
    return _human() if organism == "human" else _mouse()


def _human() -> GeneTable:
    genes = [
        (Gene(symbol, ensembl or None), previous.split("|"), alias.split("|"))
        for symbol, ensembl, previous, alias in _rows(HUMAN_FILE, HUMAN_COLUMNS)
    ]
    return GeneTable(
        id_prefix="ENSG",
        ensembl=NameIndex((gene.ensembl or "", gene) for gene, _, _ in genes),
        symbol=NameIndex((gene.symbol, gene) for gene, _, _ in genes),
        previous=NameIndex((name, gene) for gene, names, _ in genes for name in names),
        alias=NameIndex((name, gene) for gene, _, names in genes for name in names),
    )


def _mouse() -> GeneTable:
    human = gene_table("human").ensembl
    rows = [
        (mouse_ensembl, mouse_symbol, gene)
        for mouse_ensembl, mouse_symbol, human_ensembl in _rows(MOUSE_FILE, MOUSE_COLUMNS)
        for gene in human.exact(human_ensembl)
    ]
    return GeneTable(
        id_prefix="ENSMUSG",
        ensembl=NameIndex((ensembl, gene) for ensembl, _, gene in rows),
        symbol=NameIndex((symbol, gene) for _, symbol, gene in rows),
    )


def _rows(file: str, columns: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield the rows of a shipped table, checking that its header is the expected one."""
    text = gzip.decompress(files(__package__).joinpath("tables", file).read_bytes()).decode()
    header, *lines = text.splitlines()
    if header.split("\t") != list(columns):
        raise ValueError(
            f"{file} has the columns {header.split()}, not {list(columns)}. Run cellplm_scvi.genes._build."
        )
    return (line.split("\t") for line in lines)
