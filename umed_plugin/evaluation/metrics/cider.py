"""CIDEr-D of texts against one reference each (Vedantam et al. 2015), as the COCO caption tools compute it.

For n = 1..4 a text is a vector of its n-grams: how often each occurs, times log(N / documents that have it), over N references.
The score of n is sum(min(h, r) * r) / (|h| |r|), where h is the answer's vector and r the reference's, times
exp(-(difference of lengths)^2 / (2 * 6^2)). CIDEr-D is ten times the mean over n: 0..10.

Document frequencies are those of the whole set of references. Resampling draws scored answers and keeps them: a draw with fewer
references would have other frequencies, and with one reference every score is 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0
_Ngram = tuple[str, ...]


class DocumentFrequencies:
    """In how many references of a set each n-gram occurs.

    Args:
        references: all of the set, each as its words.

    Example:
        >>> known = DocumentFrequencies([["no", "effusion"], ["large", "effusion", "left"]])
        >>> round(known.cider_d(["large", "effusion", "left"], ["large", "effusion", "left"]), 4)
        7.5
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        self._documents: Counter[_Ngram] = Counter()
        count = 0
        for reference in references:
            count += 1
            self._documents.update({ngram for grams in _counts(reference).values() for ngram in grams})
        self._log_count = math.log(count) if count else 0.0

    def weighs(self, reference: Sequence[str]) -> bool:
        """Whether any n-gram of a reference has a weight. If all references hold them all, every answer scores 0."""
        return any(_norm(self._vector(counts)) for counts in _counts(reference).values())

    def cider_d(self, answer: Sequence[str], reference: Sequence[str]) -> float:
        """CIDEr-D of one answer, 0..10; both as their words."""
        said, wanted = _counts(answer), _counts(reference)
        # The COCO tools take the number of pairs of words for the length.
        longer = sum(said[2].values()) - sum(wanted[2].values())
        penalty = math.exp(-(longer**2) / (2 * _SIGMA**2))
        total = 0.0
        for n in ORDERS:
            h, r = self._vector(said[n]), self._vector(wanted[n])
            norms = _norm(h) * _norm(r)
            if norms:
                total += sum(min(value, r.get(ngram, 0.0)) * r.get(ngram, 0.0) for ngram, value in h.items()) / norms
        return 10 * penalty * total / len(ORDERS)

    def _vector(self, counts: Mapping[_Ngram, int]) -> dict[_Ngram, float]:
        return {
            ngram: count * (self._log_count - math.log(max(1, self._documents[ngram])))
            for ngram, count in counts.items()
        }


def _counts(words: Sequence[str]) -> dict[int, Counter[_Ngram]]:
    return {n: Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in ORDERS}


def _norm(vector: Mapping[_Ngram, float]) -> float:
    return math.sqrt(sum(value**2 for value in vector.values()))
