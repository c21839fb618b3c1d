"""Regenerate the shipped gene tables from files that HGNC and Ensembl publish.

``python -m cellplm_scvi.genes._build hgnc_complete_set.txt biomart_mouse_to_human.csv``

Users never need this: it is for the yearly update of ``tables/``. Note the new date and checksum in ``tables/SOURCES.md``.
"""

import argparse
import gzip
from pathlib import Path

import pandas as pd

from ._tables import HUMAN_COLUMNS, HUMAN_FILE, MOUSE_COLUMNS, MOUSE_FILE


def human_table(hgnc: pd.DataFrame) -> pd.DataFrame:
    """Keep the identifiers of the approved genes.

    Parameters
    ----------
    hgnc
        The HGNC complete set, with HGNC's own column names.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`HUMAN_COLUMNS`, one row a gene, sorted by symbol; several names are separated by ``|``, none is "".
    """
    missing = {"status", *HUMAN_COLUMNS} - set(hgnc.columns)
    if missing:
        raise ValueError(f"The HGNC table lacks the columns {sorted(missing)}. Pass HGNC's hgnc_complete_set.txt.")
    approved = hgnc.loc[hgnc["status"] == "Approved", list(HUMAN_COLUMNS)].fillna("")
    return approved.sort_values("symbol").reset_index(drop=True)


def mouse_table(orthologues: pd.DataFrame, human: pd.DataFrame) -> pd.DataFrame:
    """Keep the mouse genes that have an orthologue among HGNC's genes.

    Parameters
    ----------
    orthologues
        An Ensembl BioMart export of mouse genes with the attributes "Gene stable ID", "Gene name" and "Human gene stable ID".
    human
        What :func:`human_table` returned.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`MOUSE_COLUMNS`, one row a pair of orthologues, sorted.
    """
    names = {"Gene stable ID": "mouse_ensembl", "Gene name": "mouse_symbol", "Human gene stable ID": "human_ensembl"}
    missing = set(names) - set(orthologues.columns)
    if missing:
        raise ValueError(
            f"The BioMart table lacks the columns {sorted(missing)}. Export these attributes of mouse genes."
        )
    pairs = orthologues.rename(columns=names)[list(MOUSE_COLUMNS)].fillna("")
    pairs = pairs[pairs["human_ensembl"].isin(set(human["ensembl_gene_id"]) - {""})]
    return pairs.drop_duplicates().sort_values(list(MOUSE_COLUMNS)).reset_index(drop=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a gzipped TSV whose bytes depend on the table alone (no time stamp)."""
    text = table.to_csv(sep="\t", index=False, lineterminator="\n", quoting=3)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def main() -> None:
    """Write both tables into the package."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("hgnc", type=Path, help="HGNC's hgnc_complete_set.txt")
    parser.add_argument(
        "mouse", type=Path, help="Ensembl BioMart export (CSV) of mouse genes and their human orthologues"
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "tables", help="where to write")
    args = parser.parse_args()
    human = human_table(pd.read_csv(args.hgnc, sep="\t", dtype=str, keep_default_na=False))
    mouse = mouse_table(pd.read_csv(args.mouse, dtype=str), human)
    write_table(human, args.folder / HUMAN_FILE)
    write_table(mouse, args.folder / MOUSE_FILE)


if __name__ == "__main__":
    main()
