"""CIDEr-D as a reward: the score of many captions of one image a step, against references prepared once.

The numbers are those of the official scorer on the same tokens. Knows nothing of torch or Ray.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

MAX_NGRAM = 4
SIGMA = 6.0  # of the penalty for a difference in length: Vedantam et al. 2015, section 8
SCALE = 10.0

Tokens = Sequence[Hashable]
Ngram = tuple[Hashable, ...]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, section 8) of captions as token sequences, from 0 to 10.

    Document frequencies are those of the references it is made of, as in self-critical training (Rennie et al. 2017).
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        """`references`: the captions of each image."""
        counts = [[_count(caption) for caption in captions] for captions in references]
        frequency = Counter(ngram for captions in counts for ngram in set().union(*captions))
        log_images = math.log(max(1, len(references)))
        self._idf = {ngram: log_images - math.log(count) for ngram, count in frequency.items()}
        self._unseen = log_images
        # Of each image: where an n-gram occurs (reference, count), the norms [reference][n], the lengths.
        self._images = [self._prepare(captions) for captions in counts]

    def _prepare(
        self, captions: Sequence[Counter[Ngram]]
    ) -> tuple[dict[Ngram, list[tuple[int, int]]], list[list[float]], list[int]]:
        where: dict[Ngram, list[tuple[int, int]]] = {}
        for index, counts in enumerate(captions):
            for ngram, count in counts.items():
                where.setdefault(ngram, []).append((index, count))
        return where, [self._norms(counts) for counts in captions], [_num_bigrams(counts) for counts in captions]

    def _norms(self, counts: Counter[Ngram]) -> list[float]:
        """Euclidean length of the tf-idf vector of each n-gram size."""
        squares = [0.0] * MAX_NGRAM
        for ngram, count in counts.items():
            squares[len(ngram) - 1] += (count * self._idf.get(ngram, self._unseen)) ** 2
        return [math.sqrt(square) for square in squares]

    def score(self, image: int, caption: Tokens) -> float:
        """The score of one caption of the image of this index."""
        where, norms, lengths = self._images[image]
        if not lengths:
            return 0.0
        counts = _count(caption)
        products = [[0.0] * MAX_NGRAM for _ in lengths]
        for ngram, count in counts.items():
            for reference, reference_count in where.get(ngram, ()):
                # The min clips repetitions; of both vectors the idf is a factor.
                product = min(count, reference_count) * reference_count * self._idf[ngram] ** 2
                products[reference][len(ngram) - 1] += product
        own_norms, length = self._norms(counts), _num_bigrams(counts)
        total = 0.0
        for reference, of_reference in enumerate(products):
            penalty = math.exp(-((length - lengths[reference]) ** 2) / (2 * SIGMA**2))
            for n, product in enumerate(of_reference):
                if product:
                    total += penalty * product / (own_norms[n] * norms[reference][n])
        return SCALE * total / (MAX_NGRAM * len(lengths))


def _count(caption: Tokens) -> Counter[Ngram]:
    return Counter(_ngrams(tuple(caption)))


def _ngrams(tokens: Ngram) -> Iterator[Ngram]:
    for start in range(len(tokens)):
        for end in range(start + 1, min(start + MAX_NGRAM, len(tokens)) + 1):
            yield tokens[start:end]


def _num_bigrams(counts: Counter[Ngram]) -> int:
    """What the official scorer takes for a caption's length."""
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)
