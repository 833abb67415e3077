"""How similar two sentences are: by TF-IDF, which needs no model, or by any model of sentences."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError


class Embedder(Protocol):
    """Turns texts into rows of unit length (text, feature), so that a product of rows is their cosine.

    The paper's own needs sentence-transformers: `partial(SentenceTransformer("all-MiniLM-L6-v2").encode,
    normalize_embeddings=True)`.
    """

    def __call__(self, texts: Sequence[str], /) -> Values: ...


def tfidf(corpus: Sequence[str]) -> Embedder:
    """Words, signs and their pairs, weighted by how rare they are in `corpus`; a text of unseen words only is similar
    to nothing.

    Numbers are words: "= 12" and "= 13" differ in what matters, which averaged word vectors hardly capture.
    """
    vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True)
    if not any(text.strip() for text in corpus):
        raise InputError("no sentence has a word to compare")
    vectorizer.fit(corpus)
    return lambda texts: np.asarray(vectorizer.transform(texts).toarray(), dtype=np.float64)
