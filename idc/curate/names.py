"""How alike two names of subjects are: by their words, or by a text embedder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from idc.models.embedders import ImageTextEmbedder

Rows = NDArray[np.int64]
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_SAYING_NOTHING = """a an the this that his her its their my our your some one of in on at with and or to from by
    wearing left right"""
_EMPTY = frozenset(_SAYING_NOTHING.split())


def words_of_name(name: str) -> frozenset[str]:
    """The words that say what it is, in small letters: "The man on the left" -> {man}. All of them, where none would
    be left."""
    words = frozenset(_WORD.findall(name.casefold()))
    return words - _EMPTY or words


class NameVectors:
    """Names as unit vectors; their product is how alike they are, in [-1, 1], 1 for names of the same words.

    Args:
        names: all different names.
        rows: the number of its name for each row.
        embedder: of texts; None compares words.

    Without an embedder the vectors have an entry a word, so that the product is the share of words in common (the
    cosine of the two sets); with one they are the embedder's.
    """

    def __init__(self, names: Sequence[str], rows: Rows, embedder: ImageTextEmbedder | None = None) -> None:
        self._names, self._vectors = rows, _vectors(names, embedder)

    def between(self, rows: Rows, others: Rows) -> NDArray[np.float32]:
        """How alike the names of some rows are to those of others, `[len(rows), len(others)]`."""
        product = self._vectors[self._names[rows]] @ self._vectors[self._names[others]].T
        return np.asarray(product.toarray() if sparse.issparse(product) else product, np.float32)


def _vectors(names: Sequence[str], embedder: ImageTextEmbedder | None) -> Any:
    return _sets([words_of_name(name) for name in names]) if embedder is None else embedder.embed_texts(names).numpy()


def _sets(sets: Sequence[frozenset[str]]) -> sparse.csr_matrix:
    known: dict[str, int] = {}
    columns, values, ends = [], [], [0]
    for words in sets:
        for word in sorted(words):
            columns.append(known.setdefault(word, len(known)))
            values.append(len(words) ** -0.5)
        ends.append(len(columns))
    shape = (len(sets), max(len(known), 1))
    return sparse.csr_matrix((np.array(values, np.float32), columns, ends), shape)
