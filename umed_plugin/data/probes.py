"""Probes: questions that a model can only answer by looking, each with its control, made from any recipe's records.

After MedVH (arXiv 2407.02730), whose published files have the right answer in the last place in every row of three tasks. Here
options are shuffled by seed, and **a probe and its control have the same words and options; only the picture differs**. So
whatever an answerer says without looking at the image is right for at most one of the two: its balanced accuracy is 0.5 at most.

============== ================================================== ============================== ==========================
kind           asked                                              right for the probe            right for the control
============== ================================================== ============================== ==========================
wrong_image    a finding's question, with the picture of a        "not answerable from this      the class; its own picture
               negative or of another source                      image"
removed_option which class, without the true one                  "none of these"                the class; a study of one
                                                                                                 of the options
false_premise  on which side of the image the X is, without an X  "there is no X"                the side; a study with X
suggestion     which class, with a wrong one suggested            the true class                 the suggested class
============== ================================================== ============================== ==========================

Class questions take studies of one class. A side is the image's, as the box has it: left is left in the picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from string import ascii_uppercase
from typing import Any, Optional

from umed_plugin.data.records import PSEUDO, Record, record_geometry, true_boxes
from umed_plugin.grounding.answer_types import PROBE, asks_for_diagnosis

WRONG_IMAGE, REMOVED_OPTION, FALSE_PREMISE, SUGGESTION = KINDS = (
    "wrong_image",
    "removed_option",
    "false_premise",
    "suggestion",
)
NOT_ANSWERABLE, NONE_OF_THESE = "not answerable from this image", "none of these"
WRITER = "probes-1"
# In ``provenance``: of the diagnosis, which a probe does not have.
_OF_DIAGNOSIS = ("model", "answered_by", "prompts", "replies", "review")
_MOST_CLASSES = 4  # among the options
_MIDDLE = 0.05  # a box whose centre is nearer to the image's middle is on no side


@dataclass(frozen=True)
class Probe:
    """A probe or a control.

    Attributes:
        kind: one of `KINDS`.
        pair: number of the probe and its control within the kind.
        control: whether it is the control.
        shown: the record whose picture is shown.
        stem: the question without its options.
        options: as they are listed.
        right: index of the right one.
        escape: index of the option that refuses the question; None if there is none.
        suggested: index of the option that is suggested; None if none is.
    """

    kind: str
    pair: int
    control: bool
    shown: Record
    stem: str
    options: tuple[str, ...]
    right: int
    escape: Optional[int] = None
    suggested: Optional[int] = None

    @property
    def role(self) -> str:
        """``probe`` or ``control``."""
        return "control" if self.control else "probe"

    @property
    def text(self) -> str:
        """The question with its options."""
        listed = " ".join(f"{letter}: {option}." for letter, option in zip(ascii_uppercase, self.options))
        return f"{self.stem} Choices: {listed} Answer with the text of one choice."


@dataclass(frozen=True)
class Probes:
    """The probes of some records.

    Attributes:
        by_kind: kind -> its probes and controls, in turn.
        fallen_out: kind -> why there are none of it.
    """

    by_kind: dict[str, list[Probe]] = field(default_factory=dict)
    fallen_out: dict[str, str] = field(default_factory=dict)

    def told(self) -> list[str]:
        """A sentence for each kind that fell out."""
        return [f"no probes of the kind {kind}: {reason}" for kind, reason in self.fallen_out.items()]


def make_probes(
    records: Sequence[Record],
    seed: int = 0,
    *,
    kinds: Sequence[str] = KINDS,
    most: Optional[int] = None,
    held_out: Collection[str] = (),
) -> Probes:
    """The probes of records, each followed by its control. The same records and seed give the same probes.

    Args:
        records: of one split, from `umed_plugin.data.build.build_records`. Probes, phrases and reports are passed over.
        seed: of the order of studies and options, and of who is paired with whom.
        kinds: some of `KINDS`.
        most: pairs of each kind; None: one for each study that the kind can ask about.
        held_out: classes that these records never show. They are no options, since they would never be right.

    Example:
        >>> from umed_plugin.data.probes import make_probes
        >>> def study(name, *classes):
        ...     return {"id": name, "image": f"{name}.png", "image_size": [100, 100], "source": "drawn", "modality": "CT",
        ...             "objects": {"ref": list(classes), "bbox": [[10, 40, 30, 60]] * len(classes)},
        ...             "terms": {"cyst": ["cyst"], "nodule": ["nodule"]}, "answer_type": "grounded",
        ...             "provenance": {"image_aspect_ratio": "pad"}}
        >>> found = make_probes([study("a", "cyst"), study("b", "nodule")], kinds=["false_premise"], most=1)
        >>> for probe in found.by_kind["false_premise"]:
        ...     print(probe.role, probe.shown["id"], probe.stem, "->", probe.options[probe.right])
        probe a On which side of the image is the nodule? -> there is no nodule
        control b On which side of the image is the nodule? -> left
    """
    studies = _Studies([record for record in records if asks_for_diagnosis(record)], held_out)
    found = Probes()
    for kind in kinds:
        rng = random.Random(f"probes:{seed}:{kind}")
        pairs = list(islice(_MAKERS[kind](studies, rng), most))
        if pairs:
            found.by_kind[kind] = [probe for pair in pairs for probe in pair]
        else:
            found.fallen_out[kind] = studies.why_no(kind)
    return found


def probe_records(
    records: Sequence[Record],
    share: float,
    seed: int,
    kinds: Sequence[str] = KINDS,
    held_out: Collection[str] = (),
) -> tuple[list[Record], Probes]:
    """Probes and controls as records to train on, ``share`` times as many as ``records``, with the kinds in equal parts.

    Args:
        records: of the training split.
        share: above 0; at least one pair is made.
        seed, kinds, held_out: as for `make_probes`.

    Returns:
        The records, and the probes that they were chosen from.
    """
    wanted = max(round(share * len(records) / 2), 1)  # pairs
    found = make_probes(records, seed, kinds=kinds, most=wanted, held_out=held_out)
    lists = [probes[:] for probes in found.by_kind.values()]
    chosen: list[Probe] = []
    while lists and len(chosen) < 2 * wanted:
        for probes in lists:
            chosen += probes[:2] if len(chosen) < 2 * wanted else []
            del probes[:2]
        lists = [probes for probes in lists if probes]
    return [_as_record(probe, seed) for probe in chosen], found


def _as_record(probe: Probe, seed: int) -> Record:
    """The record of the picture, with the probe as its conversation. Its boxes stay: an augmented picture keeps its lesions."""
    shown = probe.shown
    about = {"kind": probe.kind, "role": probe.role, "pair": probe.pair}
    of_study = {key: value for key, value in shown["provenance"].items() if key not in _OF_DIAGNOSIS}
    return {
        **shown,
        "id": f"{shown['id']}~{probe.kind}-{probe.role}-{probe.pair}",
        "conversations": [
            {"from": "human", "value": f"<image>\n{probe.text}"},
            {"from": "gpt", "value": f"{probe.options[probe.right]}."},
        ],
        "answer_type": PROBE,
        "provenance": {**of_study, "writer": WRITER, "seed": seed, "probe": about},
    }


class _Studies:
    """Records by what probes need to know of them."""

    def __init__(self, records: Sequence[Record], held_out: Collection[str]) -> None:
        self.all = list(records)
        self.held_out = held_out
        self.single = [record for record in self.all if len(_classes(record)) == 1]
        self.sources = {str(record.get("source", "")) for record in self.all}
        self._of_source: dict[str, list[Record]] = {}
        for record in self.all:
            self._of_source.setdefault(str(record.get("source", "")), []).append(record)

    def beside(self, record: Record) -> list[Record]:
        """The records of the same source."""
        return self._of_source[str(record.get("source", ""))]

    def classes_among(self, record: Record, without: Sequence[str], most: int, rng: random.Random) -> list[str]:
        """The record's class and others of its source, ``most`` at most, none of ``without`` and none held out."""
        (own,) = _classes(record)
        never = {own, *without, *self.held_out}
        others = [name for name in record["terms"] if name not in never]
        return [own, *rng.sample(others, min(most - 1, len(others)))]

    def why_no(self, kind: str) -> str:
        """Why no pair of a kind could be made."""
        if kind == WRONG_IMAGE:
            return "it needs studies of one class, and a negative or a study of another source without these classes"
        if kind == FALSE_PREMISE:
            return "it needs a lesion on the left or right of its image, and a study of the source without that class"
        classes = sorted({name for record in self.single for name in _classes(record)})
        return f"it needs studies of two classes in one source, each study with one class; found: {', '.join(classes) or 'none'}"


_Pair = tuple[Probe, Probe]


def _wrong_image(studies: _Studies, rng: random.Random) -> Iterator[_Pair]:
    negatives = [record for record in studies.all if not _classes(record)]
    for number, own in enumerate(_shuffled(studies.single, rng)):
        options = studies.classes_among(own, [], _MOST_CLASSES, rng)
        offered = _words_of(own, options)
        others = [negatives] if negatives else []
        if len(studies.sources) > 1:
            others.append([record for record in studies.single if record.get("source") != own.get("source")])
        strangers = [record for pool in others for record in _some(pool, rng) if not offered & _words_of(record)]
        if strangers:
            texts = [*options, NOT_ANSWERABLE]
            yield _pair(
                WRONG_IMAGE, number, _which(own), texts, rng,
                probe=(rng.choice(strangers), NOT_ANSWERABLE), control=(own, _classes(own)[0]), escape=NOT_ANSWERABLE,
            )  # fmt: skip


def _removed_option(studies: _Studies, rng: random.Random) -> Iterator[_Pair]:
    for number, (own, other) in enumerate(_of_two_classes(studies, rng)):
        options = studies.classes_among(other, _classes(own), _MOST_CLASSES - 1, rng)
        yield _pair(
            REMOVED_OPTION, number, _which(own), [*options, NONE_OF_THESE], rng,
            probe=(own, NONE_OF_THESE), control=(other, _classes(other)[0]), escape=NONE_OF_THESE,
        )  # fmt: skip


def _false_premise(studies: _Studies, rng: random.Random) -> Iterator[_Pair]:
    sided = [
        (record, name, side) for record in studies.all for name in _classes(record) if (side := _side(record, name))
    ]
    for number, (record, name, side) in enumerate(_shuffled(sided, rng)):
        without = next((one for one in _some(studies.beside(record), rng) if name not in _classes(one)), None)
        if without is not None:
            named = record["terms"][name][0]
            escape = f"there is no {named}"
            yield _pair(
                FALSE_PREMISE, number, f"On which side of the image is the {named}?", ["left", "right", escape], rng,
                probe=(without, escape), control=(record, side), escape=escape,
            )  # fmt: skip


def _suggestion(studies: _Studies, rng: random.Random) -> Iterator[_Pair]:
    for number, (own, other) in enumerate(_of_two_classes(studies, rng)):
        (true,), (suggested,) = _classes(own), _classes(other)
        options = studies.classes_among(own, [suggested], _MOST_CLASSES - 1, rng) + [suggested]
        name = own["terms"][suggested][0]
        yield _pair(
            SUGGESTION, number, f"A colleague suggests {name}. {_which(own)}", options, rng,
            probe=(own, true), control=(other, suggested), suggested=suggested,
        )  # fmt: skip


_MAKERS: dict[str, Callable[[_Studies, random.Random], Iterator[_Pair]]] = {
    WRONG_IMAGE: _wrong_image,
    REMOVED_OPTION: _removed_option,
    FALSE_PREMISE: _false_premise,
    SUGGESTION: _suggestion,
}


def _pair(
    kind: str,
    number: int,
    stem: str,
    options: Sequence[str],
    rng: random.Random,
    *,
    probe: tuple[Record, str],
    control: tuple[Record, str],
    escape: Optional[str] = None,
    suggested: Optional[str] = None,
) -> _Pair:
    """A probe and its control: (record, right option) of each. Classes among the options are written by their plain names."""
    order = _shuffled(options, rng)
    terms: dict[str, Any] = control[0]["terms"]
    shared: dict[str, Any] = {
        "stem": stem,
        "options": tuple(terms[option][0] if option in terms else option for option in order),
        "escape": None if escape is None else order.index(escape),
        "suggested": None if suggested is None else order.index(suggested),
    }
    sides = ((False, probe), (True, control))
    first, second = (
        Probe(kind, number, is_control, record, right=order.index(right), **shared)
        for is_control, (record, right) in sides
    )
    return first, second


def _of_two_classes(studies: _Studies, rng: random.Random) -> Iterator[tuple[Record, Record]]:
    """Each study of one class, with another one of the same source and of another class."""
    by_class: dict[tuple[str, str], list[Record]] = {}
    for record in studies.single:
        by_class.setdefault((str(record.get("source", "")), _classes(record)[0]), []).append(record)
    for own in _shuffled(studies.single, rng):
        source, (name,) = str(own.get("source", "")), _classes(own)
        # Every other class is as likely, however rare: the rare ones are what a class prior forgets.
        others = sorted(key for key in by_class if key[0] == source and key[1] != name)
        if others:
            yield own, rng.choice(by_class[rng.choice(others)])


def _classes(record: Record) -> list[str]:
    return sorted(set(record["objects"]["ref"]))


def _words_of(record: Record, names: Optional[Sequence[str]] = None) -> set[str]:
    """Names and synonyms of the record's classes, or of these."""
    return {word.lower() for name in (_classes(record) if names is None else names) for word in record["terms"][name]}


def _side(record: Record, name: str) -> str:
    """``left`` or ``right``, as all boxes of the class lie in the image; empty if they do not, or lie near its middle.

    Empty for pseudo-boxes too, which no person drew.
    """
    if record["provenance"].get("boxes") == PSEUDO:
        return ""
    boxes01 = record_geometry(record).to_square(true_boxes(record))
    centres = [(box[0] + box[2]) / 2 - 0.5 for ref, box in zip(record["objects"]["ref"], boxes01) if ref == name]
    if all(centre < -_MIDDLE for centre in centres):
        return "left"
    return "right" if all(centre > _MIDDLE for centre in centres) else ""


def _which(record: Record) -> str:
    modality = record.get("modality")
    return f"Which finding does this {f'{modality} image' if modality else 'image'} show?"


def _shuffled(items: Sequence[Any], rng: random.Random) -> list[Any]:
    return rng.sample(list(items), len(items))


def _some(items: Sequence[Any], rng: random.Random, most: int = 20) -> list[Any]:
    """Some of the items in random order: all partners of all studies would take quadratic time."""
    return rng.sample(items, min(most, len(items)))
