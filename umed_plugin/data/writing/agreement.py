"""How far reviewers agree: Cohen's kappa for each pair, Fleiss' kappa for three and more, and the texts that they disagree on.

What is compared are the decisions ``accept``, ``edit`` and ``reject`` about the same text. Two edits count as agreement in kappa;
if their texts or boxes differ, the record is listed as a disagreement all the same. Kappa is agreement beyond chance, at most 1
(Cohen 1960; Fleiss 1971). It is undefined when all decisions are of one kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from umed_plugin.data.writing.decisions import ACCEPT, EDIT, REJECT, Decision
from umed_plugin.errors import UmedError

KINDS = (ACCEPT, EDIT, REJECT)
FEW = 30  # texts; with fewer, kappa is hardly more than a guess
_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Pair:
    """Two reviewers.

    Attributes:
        first, second: their names.
        texts: number of texts that both decided on.
        same: number of those with the same decision.
        kappa: Cohen's; None where it is undefined.
    """

    first: str
    second: str
    texts: int
    same: int
    kappa: float | None


@dataclass(frozen=True)
class Agreement:
    """The agreement of several reviewers.

    Attributes:
        counts: reviewer -> number of decisions of each kind.
        pairs: of all reviewers.
        texts: number of texts that all of them decided on.
        fleiss: kappa over these; None for two reviewers, and where it is undefined.
        disagreements: the decisions about each text on which at least two differ.
    """

    counts: dict[str, Counter[str]]
    pairs: list[Pair]
    texts: int
    fleiss: float | None
    disagreements: list[list[Decision]]


def measure(decisions: Sequence[Decision]) -> Agreement:
    """The agreement of the reviewers of these decisions.

    A reviewer without a name is known by the file.

    Raises:
        UmedError: there is only one reviewer, or one decided twice on a text and differently.
    """
    by_text = _by_text(decisions)
    reviewers = list(dict.fromkeys(reviewer_of(decision) for decision in decisions))
    if len(reviewers) < 2:
        found = f"only {reviewers[0]}" if reviewers else "none"
        raise UmedError(
            f"decisions of at least two reviewers are needed, and {found} is in these files. Give the files of all of them; the "
            "field Reviewer of the page says whose a file is."
        )
    counts = {name: Counter(made[name].kind for made in by_text.values() if name in made) for name in reviewers}
    of_all = [made for made in by_text.values() if len(made) == len(reviewers)]
    fleiss = fleiss_kappa([_tally(made) for made in of_all]) if len(reviewers) > 2 else None
    return Agreement(
        counts=counts,
        pairs=[_pair(by_text.values(), first, second) for first, second in combinations(reviewers, 2)],
        texts=len(of_all),
        fleiss=fleiss,
        disagreements=[list(made.values()) for made in by_text.values() if _differ(made)],
    )


def reviewer_of(decision: Decision) -> str:
    """The reviewer's name, or the file if there is none."""
    return decision.reviewer.strip() or decision.file


def _by_text(decisions: Sequence[Decision]) -> dict[tuple[str, str], dict[str, Decision]]:
    """Record and digest of a text -> reviewer -> decision."""
    by_text: dict[tuple[str, str], dict[str, Decision]] = {}
    faults = []
    for decision in decisions:
        made, name = by_text.setdefault((decision.record, decision.shown), {}), reviewer_of(decision)
        other = made.setdefault(name, decision)
        if (other.kind, other.text.strip()) != (decision.kind, decision.text.strip()):
            faults.append(f"{name} decided twice on record {decision.record!r}: {other.file}, {decision.file}.")
    if faults:
        more = f"\n... and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UmedError("\n".join(faults[:_FAULTS_SHOWN]) + f"{more}\nKeep one file of each reviewer for each page.")
    return by_text


def _pair(texts: Iterable[Mapping[str, Decision]], first: str, second: str) -> Pair:
    both = [(made[first].kind, made[second].kind) for made in texts if first in made and second in made]
    same = sum(one == other for one, other in both)
    return Pair(first, second, len(both), same, cohen_kappa(both))


def _differ(made: Mapping[str, Decision]) -> bool:
    return len({(decision.kind, decision.text.strip()) for decision in made.values()}) > 1


def _tally(made: Mapping[str, Decision]) -> list[int]:
    kinds = Counter(decision.kind for decision in made.values())
    return [kinds[kind] for kind in KINDS]


def cohen_kappa(both: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of pairs of decisions; None where it is undefined.

    Example:
        >>> cohen_kappa([("accept", "accept"), ("reject", "reject"), ("accept", "reject"), ("reject", "reject")])
        0.5
    """
    if not both:
        return None
    first, second = Counter(one for one, _ in both), Counter(other for _, other in both)
    by_chance = sum(first[kind] * second[kind] for kind in first) / len(both) ** 2
    if by_chance == 1:
        return None
    return (sum(one == other for one, other in both) / len(both) - by_chance) / (1 - by_chance)


def fleiss_kappa(tallies: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' kappa; None where it is undefined.

    Args:
        tallies: for each of N texts, how many of the n reviewers made each of the k decisions; each sums to n.
    """
    if not tallies:
        return None
    reviewers = sum(tallies[0])
    total = len(tallies) * reviewers
    by_chance = sum((sum(column) / total) ** 2 for column in zip(*tallies))
    observed = sum(sum(count * (count - 1) for count in row) for row in tallies) / (total * (reviewers - 1))
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)
