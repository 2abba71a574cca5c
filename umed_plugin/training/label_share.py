"""``--umed_label_share S``: stage 1 trains on a share S of the labelled studies, and stage 2 on the others.

Stage 2 learns little from studies that stage 1 knows by heart: all answers to them are right. A hash of source and patient
decides, so that no patient is in both stages, whatever the order of the records and the seed of the run. Where a record names no
patient, the image does.

Reports, plain items and probes may name the lesion and its place. So stage 1 has none about patients or images of stage 2.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from umed_plugin.checkpoints.label_share import LABEL_SHARE, largest_share
from umed_plugin.data.record_file import JoinedRecords, picture_hash
from umed_plugin.errors import UmedError
from umed_plugin.flags.rules import TUNING


def own_share(
    records: JoinedRecords, share: float, stage: str, image_folder: str = os.curdir
) -> tuple[JoinedRecords, str]:
    """The records that a stage trains on, and sentences with the counts of both stages and of what is left out.

    Items without true boxes, such as reports, and probes are stage 1's alone, except those about patients or images of stage 2.
    An item that names neither patient nor image stays in stage 1.

    Args:
        records: of the split train.
        share: in 0-1, both exclusive.
        stage: one of `umed_plugin.flags.rules.STAGES`.
        image_folder: that relative paths of images start from.

    Raises:
        UmedError: a stage would have no labelled study.
    """
    patients, labelled = records.column("patient"), _labelled(records)
    theirs = labelled & (patients >= share * 2.0**63)
    shared = _about_same(records, theirs, image_folder)
    parts = {"stage 1": labelled & ~shared, "stage 2": theirs}
    counts = {name: (int(part.sum()), len(np.unique(patients[part]))) for name, part in parts.items()}
    whole = f"{_studies(int(labelled.sum()))} of {_patients(len(np.unique(patients[labelled])))}"
    divided = " and ".join(f"{name} {_studies(n)} of {_patients(of)}" for name, (n, of) in counts.items())
    if not all(n for n, _ in counts.values()):
        raise UmedError(
            f"--umed_label_share {share:g} divides {whole} by patient, and gives {divided}. Each stage needs some. Choose "
            "another share, add studies of other patients, or remove the flag. Studies are records with true boxes; 'patient' "
            "and 'source' of a record say whose it is. Studies of one image cannot be in both stages."
        )
    told = f"--umed_label_share {share:g} divides {whole} by patient: {divided}. This is stage {1 + (stage != TUNING)}."
    told = " ".join([told, *_in_neither(labelled & shared & ~theirs), *_by_image(records, labelled)])
    if stage != TUNING:
        return records.where(theirs), told
    return records.where(~shared), " ".join([told, *_left_out(records, shared & ~theirs), *_unsure(records, ~shared)])


def name_share(config: Any, training_args: Any, model_args: Any, records: JoinedRecords) -> None:
    """Write into a model's configuration which share of the labelled studies stage 1 has trained on, for the stage after it.

    Stage 2, and a stage 1 without labelled studies, pass on what is known.

    Args:
        config: of the checkpoint that the stage starts from; changed in place.
        training_args, model_args: LLaVA's. A run that goes on takes in the share that its checkpoints name.
        records: that the stage trains on.
    """
    saved = Path(training_args.output_dir).glob("checkpoint-*/config.json")
    share = largest_share(vars(config), model_args.pretrain_mm_mlp_adapter, *saved)
    if training_args.umed_stage == TUNING and _labelled(records).any():
        share = max(share or 0.0, training_args.umed.umed_label_share or 1.0)
    if share is not None:
        setattr(config, LABEL_SHARE, share)


def _labelled(records: JoinedRecords) -> np.ndarray:
    return records.column("labelled") & ~records.column("probe") & ~records.column("report")


def _in_neither(left: np.ndarray) -> list[str]:
    """A sentence on the labelled studies of other patients whose image is stage 2's."""
    count = int(left.sum())
    return [f"In neither stage, since they share an image with one of stage 2: {_studies(count)}."] if count else []


def _by_image(records: JoinedRecords, labelled: np.ndarray) -> list[str]:
    """A sentence where studies name no patient: two images of one may be in both stages then."""
    nameless = int((labelled & ~records.column("has_patient")).sum())
    if not nameless:
        return []
    return [
        f"{nameless} of {int(labelled.sum())} labelled studies name no patient. Each of their images counts as a patient, so "
        "images of one patient may be in both stages. A recipe's split.patient_pattern or a column says whose they are."
    ]


def _about_same(records: JoinedRecords, studies: np.ndarray, image_folder: str) -> np.ndarray:
    """Which records, bool [n], are about a patient of these studies, or show an image that a record of such a patient has."""
    patients, pictures = records.column("patient"), records.column("picture")
    of_patients = np.isin(patients, patients[studies])
    _, first = np.unique(pictures, return_index=True)
    once = np.zeros(len(pictures), dtype=bool)
    once[first] = True
    named = [record["image"] for record in records.where(of_patients & once & (pictures >= 0))]
    known = [pictures[of_patients & (pictures >= 0)], np.array(_otherwise(named, image_folder), dtype=np.int64)]
    return of_patients | np.isin(pictures, np.concatenate(known))


def _otherwise(images: list[str], image_folder: str) -> list[int]:
    """The hashes of the images under their other path: absolute in place of relative to the folder, and the reverse."""
    folder, found = Path(os.path.abspath(image_folder)), []
    for image in images:
        path = Path(os.path.normpath(folder / image))
        if not os.path.isabs(image):
            found.append(picture_hash(str(path)))
        elif path.is_relative_to(folder):
            found.append(picture_hash(str(path.relative_to(folder))))
    return found


def _left_out(records: JoinedRecords, left: np.ndarray) -> list[str]:
    """A sentence on what stage 1 is not trained on, by kind; none where there is nothing."""
    labelled, probes, reports = _labelled(records), records.column("probe"), records.column("report")
    kinds = (
        (probes, "probe", "probes"),
        (reports, "report", "reports"),
        (~(labelled | probes | reports), "item without true boxes", "items without true boxes"),
    )
    named = [_chosen(left & part, one, several) for part, one, several in kinds if (left & part).any()]
    return [f"Left out, since they are about patients or images of stage 2: {', '.join(named)}."] if named else []


def _unsure(records: JoinedRecords, kept: np.ndarray) -> list[str]:
    """Sentences on what stage 1 keeps without knowing whose it is; none where there is nothing."""
    nameless, has_image = kept & ~_labelled(records) & ~records.column("has_patient"), records.column("has_image")
    by_image = _chosen(nameless & has_image, "item that names no patient", "items that name no patient")
    by_nothing = _chosen(
        nameless & ~has_image, "item that names neither patient nor image", "items that name neither patient nor image"
    )
    told = [f"Kept, since the image is not stage 2's: {by_image}."] if (nameless & has_image).any() else []
    return told + ([f"Kept: {by_nothing}."] if (nameless & ~has_image).any() else [])


def _chosen(part: np.ndarray, one: str, several: str) -> str:
    return _counted(int(part.sum()), one, several)


def _studies(count: int) -> str:
    return _counted(count, "labelled study", "labelled studies")


def _patients(count: int) -> str:
    return _counted(count, "patient", "patients")


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
