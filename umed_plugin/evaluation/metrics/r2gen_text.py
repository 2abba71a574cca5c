"""Texts as R2Gen scores them (Chen et al., EMNLP 2020; read in its code): ``--as r2gen``.

R2Gen compares what its model writes in its own vocabulary with references that went through the same vocabulary. Both are easier
to match than the reports themselves, so its figures are higher and belong beside figures of the same treatment only:

- lower case; quotes, slashes and ``.,?;:*!%^&_+()<>=@[]{}`` are dropped, a hyphen is kept;
- numbers 1 to 5 that begin the points of a list are dropped, and each sentence ends with a separate ``.``;
- words that occur fewer than 3 times (MIMIC-CXR: 10) in the reports of the training split become ``<unk>``;
- a text is cut to 60 tokens (MIMIC-CXR: 100), of which the first is the start mark: 59 words.

An answer here is cleaned and cut like a reference. Its rare words stay, since our model has no ``<unk>``: they match nothing.
Departure: underscores and line breaks are treated as for MIMIC-CXR in both data sets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

UNKNOWN = "<unk>"
_DROPPED = re.compile(r"""[.,?;:*!%^&_+()<>=@\[\]{}"/\\']""")
_POINTS = (2, 3, 4, 5)


@dataclass(frozen=True)
class R2GenTreatment:
    """R2Gen's settings of a data set; the defaults are those for IU X-ray.

    Attributes:
        least_count: a word needs to occur so often in the training reports.
        most_tokens: of a text, with its start mark.
    """

    least_count: int = 3
    most_tokens: int = 60

    def vocabulary(self, reports: Iterable[str]) -> frozenset[str]:
        """The words of the training reports that are kept."""
        counts = Counter(word for report in reports for word in cleaned(report))
        return frozenset(word for word, count in counts.items() if count >= self.least_count)

    def reference(self, report: str, vocabulary: frozenset[str]) -> list[str]:
        """The words of a reference as R2Gen scores against it."""
        return [word if word in vocabulary else UNKNOWN for word in self.answer(report)]

    def answer(self, text: str) -> list[str]:
        """The words of an answer."""
        return cleaned(text)[: self.most_tokens - 1]


def cleaned(report: str) -> list[str]:
    """The words of a report without marks, each sentence with a ``.`` behind it.

    Example:
        >>> cleaned('1. Heart "normal".  2. No follow-up, XXXX.')
        ['heart', 'normal', '.', 'no', 'follow-up', 'xxxx', '.']
    """
    text = re.sub(r"_{2,}", "_", report.replace("\n", " "))
    text = re.sub(r"\.{2,}", ".", re.sub(r" {2,}", " ", text)).replace("1. ", "")
    for before in (". ", " "):
        for point in _POINTS:
            text = text.replace(f"{before}{point}. ", ". ")
    sentences = (_DROPPED.sub("", sentence).strip() for sentence in text.strip().lower().split(". "))
    return f"{' . '.join(sentences)} .".split()
