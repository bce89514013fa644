"""Dealing vases to train, validation and test.

Vases that share a byte-identical image stay together. They are dealt within strata, in an order that a
hash of seed and name gives: a vase that comes or goes in one stratum moves no vase of another.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scripts.common import tables
from scripts.common.errors import KilnError
from scripts.vase.settings import SplitSettings

SIDES = ("train", "validation", "test")


def group_by_identity(vases: pd.Series, hashes: pd.Series) -> pd.Series:
    """For each vase (index) the first name of the vases that it is tied to by identical images."""
    names = np.sort(vases.unique())
    vase_code = pd.Categorical(vases, categories=names).codes
    hash_code = pd.factorize(hashes)[0]
    count = len(names) + hash_code.max() + 1
    edges = coo_array((np.ones(len(vases)), (vase_code, len(names) + hash_code)), shape=(count, count))
    _, component = connected_components(edges, directed=False)
    first = pd.Series(names).groupby(component[: len(names)]).transform("min")
    return pd.Series(first.to_numpy(), index=names)


def deal(strata: pd.Series, shares: Sequence[float], seed: int) -> pd.Series:
    """A side for each group, stratum by stratum.

    Within a stratum of n groups in hash order, group i goes where (i + u) / n falls among the shares'
    cumulative cuts; u in [0, 1) is a hash of the stratum, so that small strata round without bias.

    Args:
        strata: stratum of each group (index: group).
        shares: of train, validation and test; they sum to 1.
        seed: another seed deals anew.
    """
    cuts = np.cumsum(shares)[:-1]
    sides = pd.Series(index=strata.index, dtype=object)
    for stratum, members in strata.groupby(strata):
        order = sorted(members.index, key=lambda group: (_unit(seed, "group", group), group))
        position = (np.arange(len(order)) + _unit(seed, "stratum", str(stratum))) / len(order)
        sides[order] = np.array(SIDES)[np.searchsorted(cuts, position, side="right")]
    return sides


def _unit(seed: int, kind: str, name: str) -> float:
    digest = hashlib.sha256(f"{seed}\0{kind}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def attribute_strata(groups: pd.Series, table: Path | None, columns: Sequence[str]) -> pd.Series:
    """A stratum for each group, from the attributes of its first vase; "?" where the table has none.

    Args:
        groups: group of each vase (index: vase).
        table: attributes by vase (column `vase`).
        columns: of the table.

    Raises:
        KilnError: columns are named, but there is no table, or it has two rows for a vase.
    """
    names = pd.Index(sorted(set(groups)))
    strata = pd.Series("", index=names)
    if not columns:
        return strata
    if table is None:
        raise KilnError("vase.split.stratify names columns, but there is no table", "set vase.attributes")
    attributes = tables.read_table(table, ["vase", *columns])
    attributes = attributes.set_index(attributes["vase"].astype(str))
    doubled = attributes.index[attributes.index.duplicated()]
    if len(doubled):
        raise KilnError(f"{table}: two rows for vase {doubled[0]!r}", "keep one row for each vase")
    first = pd.Series(groups.index, index=groups.to_numpy()).groupby(level=0).min()
    for column in columns:
        texts = dict(zip(attributes.index, map(_text, attributes[column]), strict=True))
        strata = strata + " | " + first.map(lambda vase, texts=texts: texts.get(vase, "?"))
    return strata


def _text(value: object) -> str:
    """A value's name, the same whether or not a gap elsewhere turned its column into floats."""
    if pd.isna(value):
        return "?"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def shares(values: SplitSettings) -> tuple[float, float, float]:
    """Shares of train, validation and test."""
    return values.train, values.validation, values.test
