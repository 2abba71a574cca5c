"""The studies of a run and the sampled answers of stage 2, as data for the page.

Sorting, filtering and drawing happen in the page (``report.js``); what needs pixels or coordinates happens here. Boxes are in 0-1
of the square that the model sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.commands.report.pictures import SeenImage, as_augmented, as_data_url, see
from umed_plugin.commands.report.table import Looked
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe_cases import Case, cases_of
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.grounding.answer_types import REPORT
from umed_plugin.grounding.boxes import is_degenerate, is_inside
from umed_plugin.grounding.dialects import LLAVA
from umed_plugin.grounding.geometry import ImageGeometry

Card = dict[str, Any]
Progress = Callable[[int, int], None]

_NOT_TERMS = {"text", "reward"}  # of a candidate: the other keys are the rewards' names


def study_cards(
    evaluations: Mapping[str, Evaluation], most: int, run_folder: Path, progress: Progress | None = None
) -> list[Card]:
    """A card for each study, at most ``most`` of them, in the order in which they were asked.

    Args:
        evaluations: stage -> evaluation; a stage may lack some of the studies.
        run_folder: where images that have been moved are looked for.
        progress: called with (cards made, cards in all).
    """
    answered: dict[str, dict[str, Case]] = {}
    for stage, evaluation in evaluations.items():
        for case in cases_of(evaluation):
            answered.setdefault(case.id, {})[stage] = case
    chosen = choose([list(cases.values()) for cases in answered.values()], most)
    wanted = {cases[0].id for cases in chosen}
    cards = []
    for cases in (cases for study, cases in answered.items() if study in wanted):
        cards.append(_study_card(cases, evaluations, run_folder))
        if progress is not None:
            progress(len(cards), len(wanted))
    return cards


def choose(studies: Sequence[list[Case]], most: int) -> list[list[Case]]:
    """Of too many studies, a third with the largest gains, a third with the worst last answers, and others evenly spaced."""
    if len(studies) <= most:
        return list(studies)
    by_gain = sorted(studies, key=lambda cases: cases[-1].set_iou - cases[0].set_iou, reverse=True)
    by_failure = sorted(studies, key=lambda cases: (cases[-1].set_iou, cases[-1].accuracy or 0.0))
    third = most // 3
    taken = {cases[0].id: cases for cases in [*by_gain[:third], *by_failure[:third]]}
    others = [cases for cases in studies if cases[0].id not in taken]
    left = most - len(taken)
    return [*taken.values(), *(others[index * len(others) // left] for index in range(left))]


def _study_card(cases: Mapping[str, Case], stages: Iterable[str], run_folder: Path) -> Card:
    first = next(iter(cases.values()))
    seen, picture = _seen(first.image, first.image_aspect_ratio, first.reading, run_folder)
    return {
        "id": first.id,
        "source": first.source or "unknown",
        "modality": first.modality,
        "question": first.question,
        "reference": first.truth,
        "classes": first.true_classes,
        **picture,
        "true": seen.boxes01(first.true_boxes) if seen else [],
        "true_count": len(first.true_boxes),
        "covered": float(seen.geometry.patch_cover(first.true_boxes).mean()) if seen else 0.0,
        "answers": [_answer(cases[stage], seen) if stage in cases else None for stage in stages],
    }


def _seen(
    image: str,
    mode: str,
    reading: Mapping[str, Any] | None,
    run_folder: Path,
    augmented: Mapping[str, Any] | None = None,
) -> tuple[SeenImage | None, dict[str, str]]:
    """The image and its part of the card. A missing picture is reported on its card and does not stop the report."""
    try:
        seen = see(image, mode, reading, run_folder)
        if augmented is not None:
            seen = as_augmented(seen, augmented)
    except UmedError as error:
        return None, {"picture": "", "fault": str(error)}
    return seen, {"picture": as_data_url(seen.square), "fault": ""}


def _answer(case: Case, seen: SeenImage | None) -> Card:
    return {
        "text": case.answer,
        "accuracy": case.accuracy,
        "iou": None if case.answer_type == REPORT else case.set_iou,
        "relevance": case.vision_relevance,
        "boxes": seen.boxes01(case.boxes) if seen else [],
        "drawn": len(case.boxes),
        "malformed": sum(is_degenerate(box) for box in case.boxes),
        "heat": case.heat,
    }


def looked_over_uniform(evaluations: Mapping[str, Evaluation], cards: Sequence[Card]) -> tuple[Looked | None, str]:
    """The vision relevance of each stage beside chance, over all studies of its value; None where no study has both.

    Files of earlier versions do not say how large an image is: there the cards know what a lesion covers. Where a study has no
    card either, nothing is shown, and the second value says why.
    """
    of_cards = {card["id"]: card["covered"] for card in cards if card["picture"]}
    covers: dict[str, float | None] = {}
    looked: dict[str, dict[str, float]] = {}
    for stage, evaluation in evaluations.items():
        for case in cases_of(evaluation):
            if case.vision_relevance is None or not case.true_boxes:
                continue
            if case.id not in covers:
                covers[case.id] = _covered(case, of_cards)
            looked.setdefault(stage, {})[case.id] = case.vision_relevance
    unknown = sum(covered is None for covered in covers.values())
    if unknown:
        return None, (
            f"Vision relevance is not shown beside that of uniform attention: for {unknown} of {len(covers)} studies with a "
            "lesion neither the evaluation nor the gallery knows how large the image is. Evaluate again."
        )
    known = {study: covered for study, covered in covers.items() if covered}
    times = {}
    for stage, relevances in looked.items():
        pairs = [(relevance, known[study]) for study, relevance in relevances.items() if study in known]
        if pairs:
            times[stage] = sum(relevance for relevance, _ in pairs) / sum(covered for _, covered in pairs)
    return (Looked(sum(known.values()) / len(known), times) if times else None), ""


def _covered(case: Case, of_cards: Mapping[str, float]) -> float | None:
    """The share of the picture that the lesions of a study cover, 0-1; None if the size of its image is not known."""
    if case.image_size is None:
        return of_cards.get(case.id)
    geometry = ImageGeometry(case.image_size[0], case.image_size[1], case.image_aspect_ratio)
    return float(geometry.patch_cover(case.true_boxes).mean())


def candidate_cards(
    lines: Sequence[Mapping[str, Any]], run_folder: Path, progress: Progress | None = None
) -> list[Card]:
    """A card for each question of stage 2 whose sampled answers were logged."""
    cards = []
    for line in lines:
        cards.append(_candidate_card(line, run_folder))
        if progress is not None:
            progress(len(cards), len(lines))
    return cards


def _candidate_card(line: Mapping[str, Any], run_folder: Path) -> Card:
    study, rows = line.get("study", {}), line["candidates"]
    seen: SeenImage | None = None
    picture = {
        "picture": "",
        "fault": "the run was logged by a version of the plugin that did not record the image's path",
    }
    if study.get("image"):
        moved = study.get("augmented")
        seen, picture = _seen(study["image"], study["image_aspect_ratio"], study.get("reading"), run_folder, moved)
    terms = [name for name in rows[0] if name not in _NOT_TERMS]
    return {
        "id": line["id"],
        "step": line["step"],
        "sampling": _sampling(line),
        "source": study.get("source") or "unknown",
        "modality": study.get("modality") or "",
        "question": study.get("question", ""),
        "reference": study.get("reference") or "",
        "classes": line["true"]["ref"],
        **picture,
        "true": seen.boxes01(line["true"]["bbox"]) if seen else [],
        "true_count": len(line["true"]["bbox"]),
        "terms": terms,
        "weights": [line["weights"].get(name) for name in terms] if "weights" in line else None,
        "rows": [_candidate(row, terms, line.get("normalised"), place) for place, row in enumerate(rows)],
    }


def _sampling(line: Mapping[str, Any]) -> str:
    """What dynamic sampling has done with the answers; empty for those of a first sampling that are learnt from."""
    extra = f"extra sampling {line['extra_sampling']}" if line.get("extra_sampling") else ""
    if line.get("learnt_from", True):
        return extra
    return f"{extra}, not learnt from" if extra else "replaced by another question, not learnt from"


def _candidate(
    row: Mapping[str, Any], terms: Sequence[str], normalised: Mapping[str, Sequence[float]] | None, place: int
) -> Card:
    boxes = LLAVA.read_all(row["text"], 1, 1)  # training reads no other form; 0-1 needs no size
    return {
        "text": row["text"],
        "reward": row["reward"],
        "terms": [row[name] for name in terms],
        "normalised": [normalised[name][place] for name in terms] if normalised else None,
        "boxes": [box for box in boxes if box is not None and is_inside(box)],
        "malformed": sum(box is None or not is_inside(box) for box in boxes),
    }
