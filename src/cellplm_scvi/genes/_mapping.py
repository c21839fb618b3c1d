"""Gene symbols to Ensembl ids and back, where HGNC leaves no doubt."""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd

from ._tables import Gene, GeneTable, Organism, gene_table

Target = Literal["ensembl", "symbol"]
How = Literal["ensembl_id", "symbol", "previous", "alias", "no_ensembl_id", "ambiguous", "unknown"]

# version and pseudoautosomal copy as GENCODE writes them, and what var_names_make_unique appends to a repeated id
_ENSEMBL_ID = re.compile(r"(ENS([A-Z]{3,4})?G\d{11})(\.\d+)?(_PAR_Y)?(-\d+)?", re.IGNORECASE)
# "-1" of AnnData's var_names_make_unique, ".1" of R's make.unique
_MADE_UNIQUE = re.compile(r"(.+)[-.]\d+")
_MOUSE_NAME = re.compile(r"ENSMUSG\d{11}(\.\d+)?|[A-Z][a-z]+[a-z0-9-]*")


@dataclass(frozen=True, eq=False, repr=False)
class GeneMapping:
    """What each name was translated to, and how sure that is.

    Attributes
    ----------
    mapped
        Ensembl id or symbol of each name, missing where there is none or more than one;
        the index holds the names as they were given, in their order.
    how
        How each name was found, with the index of `mapped`: as an ``"ensembl_id"``, an approved ``"symbol"``, a
        ``"previous"`` symbol or an ``"alias"``; not translated are ``"ambiguous"`` names, those of a gene with
        ``"no_ensembl_id"``, and ``"unknown"`` ones.
    ambiguous
        The names that may mean more than one gene, with the approved symbols of these genes.
    unknown
        The names that no gene goes by, each once, in order of appearance; a missing name is None.
    target, organism
        What was asked for.
    """

    mapped: pd.Series
    how: pd.Series
    ambiguous: dict[str, list[str]]
    unknown: list[str | None]
    target: Target
    organism: Organism

    @property
    def collisions(self) -> dict[str, list[str]]:
        """The targets that different names were translated to, with these names.

        The names may be synonyms, or repeats that were made unique; or else an old name measures another locus than HGNC
        thinks of. Add up or drop such columns before they share a name.
        """
        names = self.mapped.index.to_series().groupby(self.mapped.to_numpy(), sort=False).unique()
        return {str(target): list(same) for target, same in names.items() if len(same) > 1}

    def __repr__(self) -> str:
        source = "names" if self.organism == "human" else f"{self.organism} names"
        target = "Ensembl ids" if self.target == "ensembl" else "approved symbols"
        found = self.mapped.notna()
        counts = self.how[found].value_counts()
        lines = [f"GeneMapping of {len(self.mapped):,} {source} to human {target}", f"  mapped: {found.sum():,}"]
        if len(counts):
            lines[-1] += f" ({', '.join(f'{n:,} by {how}' for how, n in counts.items())})"
        without_id = self.how.index[self.how == "no_ensembl_id"].unique()
        for label, names in [
            ("ambiguous", [f"{name} ({' or '.join(genes)})" for name, genes in self.ambiguous.items()]),
            ("no Ensembl id", list(without_id)),
            ("unknown", self.unknown),
            ("same target", ["/".join(same) + f" ({target})" for target, same in self.collisions.items()]),
        ]:
            if names:
                lines.append(f"  {label}: {len(names):,}: {_some(names)}")
        return "\n".join(lines)


def to_ensembl(names: Iterable[Any], *, organism: Organism = "human") -> pd.Series:
    """Human Ensembl gene ids of gene names.

    Parameters
    ----------
    names
        Gene symbols, approved by HGNC or outdated, or Ensembl ids, also mixed; see :func:`map_genes`.
    organism
        Whose genes `names` are. ``"mouse"``: the ids are those of their human orthologues.

    Returns
    -------
    pandas.Series
        Ensembl ids without version, missing where the name is ambiguous or unknown; the index is `names`.

    Raises
    ------
    TypeError
        If `names` is a single string, or one of them is no string.

    Warns
    -----
    UserWarning
        If names are left without an id. :func:`map_genes` lists them all and says how the others were found.

    Examples
    --------
    >>> from cellplm_scvi.genes import to_ensembl
    >>> to_ensembl(["CD3E", "SEPT2", "ENSG00000141510.18"]).tolist()
    ['ENSG00000198851', 'ENSG00000168385', 'ENSG00000141510']
    """
    mapping = _map(names, "ensembl", organism)
    _warn_unmapped(mapping)
    return mapping.mapped


def to_symbol(ids: Iterable[Any], *, organism: Organism = "human") -> pd.Series:
    """Approved human symbols of Ensembl gene ids.

    Parameters
    ----------
    ids
        Ensembl ids, or gene symbols to bring up to date, also mixed; see :func:`map_genes`.
    organism
        Whose genes `ids` are. ``"mouse"``: the symbols are those of their human orthologues.

    Returns
    -------
    pandas.Series
        Symbols that HGNC approves, missing where the id is ambiguous or unknown; the index is `ids`.

    Raises
    ------
    TypeError
        If `ids` is a single string, or one of them is no string.

    Warns
    -----
    UserWarning
        If ids are left without a symbol. :func:`map_genes` lists them all and says how the others were found.

    Examples
    --------
    >>> from cellplm_scvi.genes import to_symbol
    >>> to_symbol(["ENSG00000198851", "ENSG00000141510.18", "SEPT2"]).tolist()
    ['CD3E', 'TP53', 'SEPTIN2']
    """
    mapping = _map(ids, "symbol", organism)
    _warn_unmapped(mapping)
    return mapping.mapped


def map_genes(names: Iterable[Any], target: Target = "ensembl", *, organism: Organism = "human") -> GeneMapping:
    """Translate gene names and report how each was found.

    A name is an Ensembl id, else an approved symbol, else a previous one (expression data are annotated with the
    approved symbols of their day), else an alias, else one of these with the case ignored. So an approved symbol wins over
    an older meaning of the same name; a name that several genes have at the first of these steps stays untranslated.
    Surrounding blanks and the version of an Ensembl id are ignored, and so is a number that ``var_names_make_unique``
    (``-1``) or R's ``make.unique`` (``.1``) appended to an approved or previous symbol.

    Aliases are the least sure: of Ensembl's names of clones, such as AC007365.1, about one in twenty has changed its gene.

    Parameters
    ----------
    names
        Gene names, for example ``adata.var_names``; None and NaN count as unknown.
    target
        ``"ensembl"`` or ``"symbol"``. An Ensembl id that HGNC does not know is kept for the former, unknown for the latter.
    organism
        Whose genes `names` are. ``"mouse"``: the targets are their human orthologues, as Ensembl has them; a mouse gene with
        several is ambiguous, and one without is unknown. Mouse genes are known by their Ensembl ids and present symbols.

    Returns
    -------
    GeneMapping
        Its fields are aligned with `names`, and printing it gives a summary.

    Raises
    ------
    TypeError
        If `names` is a single string, or one of them is no string.
    ValueError
        If `names` is a table, or `target` or `organism` is none of the words above.

    Warns
    -----
    UserWarning
        If `organism` is ``"human"`` and most names look like a mouse's.

    Examples
    --------
    >>> from cellplm_scvi.genes import map_genes
    >>> map_genes(["CD3E", "SEPT2", "B3GNT1", "no gene"])
    GeneMapping of 4 names to human Ensembl ids
      mapped: 2 (1 by symbol, 1 by previous)
      ambiguous: 1: B3GNT1 (B3GNT2 or B4GAT1)
      unknown: 1: no gene
    """
    return _map(names, target, organism)


def _map(names: Iterable[Any], target: Target, organism: Organism) -> GeneMapping:
    for value, kind, argument in ((target, Target, "target"), (organism, Organism, "organism")):
        if value not in get_args(kind):
            raise ValueError(f'{argument}="{value}" is not one of {get_args(kind)}.')
    given = _strings(names)
    table = gene_table(organism)

    found: dict[str | None, tuple[How, list[Gene]]] = {
        name: ("unknown", []) if name is None else _find(name, table) for name in dict.fromkeys(given)
    }
    result = {name: _translate(name, how, genes, target, organism) for name, (how, genes) in found.items()}

    if organism == "human":
        _warn_mouse(given)
    index = pd.Index(given) if given else pd.Index([], dtype=object)
    return GeneMapping(
        mapped=pd.Series([result[name][0] for name in given], index=index, name=target),
        how=pd.Series([result[name][1] for name in given], index=index, name="how"),
        ambiguous={str(name): [g.symbol for g in found[name][1]] for name in found if result[name][1] == "ambiguous"},
        unknown=[name for name in found if result[name][1] == "unknown"],
        target=target,
        organism=organism,
    )


def _strings(names: Iterable[Any]) -> list[str | None]:
    """Return the names as a list of str and None, or raise if they are anything else."""
    if isinstance(names, str | bytes):
        raise TypeError(f"names is the single value {names!r}. Pass a list of names: [{names!r}].")
    if not isinstance(names, Iterable):
        raise TypeError(f"names is of type {type(names).__name__}. Pass a list of names, such as adata.var_names.")
    if getattr(names, "ndim", 1) != 1:
        raise ValueError(f"names has the shape {names.shape}. Pass one column of it.")  # type: ignore[attr-defined]
    strings: list[str | None] = []
    for position, name in enumerate(names):
        if isinstance(name, str):
            strings.append(name)
        elif name is None or name is pd.NA or (isinstance(name, float) and name != name):
            strings.append(None)
        else:
            raise TypeError(f"names[{position}] is {name!r}, of type {type(name).__name__}. Gene names are strings.")
    return strings


def _find(given: str, table: GeneTable) -> tuple[How, list[Gene]]:
    """Return the genes that a name may mean, by the surest way that finds any."""
    name = given.strip()
    if match := _ENSEMBL_ID.fullmatch(name):
        return "ensembl_id", table.ensembl.exact(match[1].upper())
    if genes := table.symbol.exact(name):
        return "symbol", genes
    if genes := table.previous.exact(name):
        return "previous", genes
    if genes := table.alias.exact(name):
        # "Cad" is an alias of B4GALNT2, but CAD is another gene: a difference of case is no ground to decide on
        return "alias", list(dict.fromkeys([*genes, *table.symbol.folded(name)]))
    if genes := table.symbol.folded(name):
        return "symbol", genes
    if genes := table.previous.folded(name):
        return "previous", genes
    if genes := table.alias.folded(name):
        return "alias", genes
    if match := _MADE_UNIQUE.fullmatch(name):
        # without aliases: many are names of clones, and "U73166.2" is another gene than U73166
        if genes := table.symbol.exact(match[1]):
            return "symbol", genes
        if genes := table.previous.exact(match[1]):
            return "previous", genes
    return "unknown", []


def _translate(
    given: str | None, how: How, genes: list[Gene], target: Target, organism: Organism
) -> tuple[str | None, How]:
    """Return the target of a name that may mean these genes, and how it was found or why not."""
    match = _ENSEMBL_ID.fullmatch((given or "").strip())
    if match and not match[2] and target == "ensembl" and organism == "human":
        return match[1].upper(), how
    targets = {getattr(gene, target) for gene in genes}
    if not targets:
        return None, "unknown"
    if len(targets) > 1:
        return None, "ambiguous"
    value = targets.pop()
    return value, how if value else "no_ensembl_id"


def _some(names: Sequence[object], most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def _warn_unmapped(mapping: GeneMapping) -> None:
    missing = mapping.mapped.isna()
    if missing.any():
        what = "Ensembl id" if mapping.target == "ensembl" else "symbol"
        names = list(mapping.mapped.index[missing].unique())
        warnings.warn(
            f"{missing.sum():,} of {len(missing):,} names have no {what}, for example {_some(names)}. "
            f'print(map_genes(names, "{mapping.target}")) says why.',
            stacklevel=3,
        )


def _warn_mouse(names: Sequence[str | None]) -> None:
    """Warn if most names have the shape of a mouse gene's, which a human gene's seldom has."""
    mouse = [name for name in names if name and _MOUSE_NAME.fullmatch(name.strip())]
    if len(mouse) > len(names) / 2:
        warnings.warn(
            f"{len(mouse):,} of {len(names):,} names look like those of mouse genes ({_some(mouse, 3)}). "
            'Pass organism="mouse" to have their human orthologues, or name genes by these first: '
            '`cellplm_scvi.genes.to_ensembl(names, organism="mouse")`.',
            stacklevel=4,
        )
