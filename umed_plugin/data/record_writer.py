"""The record of an image: its question and answer in words, and all that training and evaluation need to know of it."""

from __future__ import annotations

import os
import random
from collections.abc import Collection
from pathlib import Path
from typing import Optional

from umed_plugin.data import phrase_writer, report_writer, template_writer
from umed_plugin.data.annotations import Annotated
from umed_plugin.data.looks import looks_question
from umed_plugin.data.prepared import Prepared, picture_name
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.data.records import FILE_NAME, PSEUDO, Record
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.data.volumes import shown_slices
from umed_plugin.files import text_bytes
from umed_plugin.grounding.answer_types import GROUNDED, NEGATIVE, PHRASE, REPORT
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.terms import find_terms

# answer_type -> name and version of what words its question and answer. Records are built anew when one changes.
WRITERS = {
    GROUNDED: template_writer.WRITER,
    NEGATIVE: template_writer.WRITER,
    PHRASE: phrase_writer.WRITER,
    REPORT: report_writer.WRITER,
}


def written_record(
    prepared: Prepared,
    out_dir: Optional[Path],
    geometry: ImageGeometry,
    decimals: int,
    seed: int,
    held_out: Collection[str] = (),
) -> Record:
    """The record of an image, with its question and answer.

    Args:
        out_dir: folder of rendered images; None: the record says how the file is read.
        geometry: of the image.
        decimals: of coordinates in the text.
        seed: of the wording.
        held_out: classes that only the test has. No other record says what they look like, so none asks for them.
    """
    record = _record(prepared, out_dir, geometry, decimals, seed)
    looks = {
        name: looks
        for name, looks in prepared.item.recipe.looks.items()
        if record["split"] == "test" or name not in held_out
    }
    if looks:
        record["looks"] = looks
    # Seeded per record: a record's wording does not depend on which others are built.
    rng = random.Random(text_bytes(f"{seed}:{record['id']}"))
    if record["answer_type"] == PHRASE:
        record["conversations"] = phrase_writer.write_phrase_conversation(record, geometry, rng, decimals)
    elif record["answer_type"] == REPORT:
        record["conversations"] = report_writer.write_report_conversation(prepared.item.report, rng)
    else:
        asked = looks_question(record, prepared.item.recipe.looks_share, seed) if record["split"] == "train" else None
        if asked:
            record["asked"] = asked
        record["conversations"] = write_conversation(record, geometry, rng, decimals)
    return record


def _record(prepared: Prepared, out_dir: Optional[Path], geometry: ImageGeometry, decimals: int, seed: int) -> Record:
    item, recipe = prepared.item, prepared.item.recipe
    image, reading = str(item.image), {}
    if not prepared.by_llava and out_dir is None:
        reading = {"reading": prepared.reading}
    elif not prepared.by_llava:
        image = prepared.rendered
    return {
        "id": record_id(item),
        "image": image,
        **reading,
        "conversations": [],
        "objects": {
            "ref": _named_in(item.report, recipe) if item.report else prepared.classes,
            "bbox": [[round(value, 3) for value in box] for box in prepared.boxes],
            "bbox_type": "real",
        },
        "image_size": list(prepared.size),
        "terms": recipe.names,
        "source": recipe.name,
        "modality": item.modality,
        "patient": item.patient,
        "split": item.split,
        "answer_type": answer_type_of(prepared),
        **({"phrase": item.phrase} if item.phrase else {}),
        **({"augment": recipe.augment.model_dump()} if recipe.augment is not None else {}),
        **({"held_out": True} if item.held_out else {}),
        "provenance": {
            "recipe": recipe.name,
            "recipe_sha256": recipe.sha256,
            **({"mixture": recipe.mixture} if recipe.mixture else {}),
            "writer": WRITERS[answer_type_of(prepared)],
            "seed": seed,
            "image_aspect_ratio": geometry.mode,
            "box_decimals": decimals,
            "original": os.path.relpath(item.image, item.root),
            "slice": shown_slices(item),
            **({"patient": FILE_NAME} if item.patient_is_file else {}),
            **({"burned_in_annotation": prepared.burned_in} if prepared.burned_in else {}),
            **({} if prepared.box_score is None else {"boxes": PSEUDO, "box_score": prepared.box_score}),
        },
    }


def answer_type_of(prepared: Prepared) -> str:
    """What the record of an image asks for: one of `umed_plugin.grounding.answer_types.ANSWER_TYPES`."""
    if prepared.item.report:
        return REPORT
    if prepared.item.phrase:
        return PHRASE
    return GROUNDED if prepared.boxes else NEGATIVE


def _named_in(report: str, recipe: Recipe) -> list[str]:
    """The classes that a report names and does not rule out, in the order of their first mention."""
    return list(dict.fromkeys(name for _, _, name in find_terms(report, recipe.names)))


def record_id(item: Annotated) -> str:
    """The id of an item's record."""
    return picture_name(item) + (f": {item.phrase}" if item.phrase else "")
