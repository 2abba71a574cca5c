"""``--umed_label_share S``: stage 1 trains on a share S of the labelled studies, and stage 2 on the others.

Stage 2 learns little from studies that stage 1 knows by heart: all answers to them are right. A hash of source and patient
decides, so that no patient is in both stages, whatever the order of the records and the seed of the run. Where a record names no
patient, the image does.
"""

from __future__ import annotations

import numpy as np

from umed_plugin.data.record_file import JoinedRecords
from umed_plugin.errors import UmedError
from umed_plugin.flags.rules import TUNING


def own_share(records: JoinedRecords, share: float, stage: str) -> tuple[JoinedRecords, str]:
    """The records that a stage trains on, and a sentence with the counts of both stages.

    Items without true boxes, such as reports, are stage 1's, all of them. Probes are trained on in stage 1 alone, and there only
    those of its own patients.

    Args:
        records: of the split train.
        share: in 0-1, both exclusive.
        stage: one of `umed_plugin.flags.rules.STAGES`.

    Raises:
        UmedError: a stage would have no labelled study.
    """
    patients, probes = records.column("patient"), records.column("probe")
    labelled = records.column("labelled") & ~probes & ~records.column("report")
    tunes = patients < share * 2.0**63
    parts = {"stage 1": labelled & tunes, "stage 2": labelled & ~tunes}
    counts = {name: (int(part.sum()), len(np.unique(patients[part]))) for name, part in parts.items()}
    whole = f"{_studies(int(labelled.sum()))} of {_patients(len(np.unique(patients[labelled])))}"
    divided = " and ".join(f"{name} {_studies(n)} of {_patients(of)}" for name, (n, of) in counts.items())
    if not all(n for n, _ in counts.values()):
        raise UmedError(
            f"--umed_label_share {share:g} divides {whole} by patient, and gives {divided}. Each stage needs some. Choose "
            "another share, add studies of other patients, or remove the flag. Studies are records with true boxes; 'patient' "
            "and 'source' of a record say whose it is."
        )
    told = f"--umed_label_share {share:g} divides {whole} by patient: {divided}. This is stage {1 + (stage != TUNING)}."
    if stage != TUNING:
        return records.where(labelled & ~tunes), told
    passed_over = int((probes & ~tunes).sum())
    if passed_over:
        told += f" {passed_over} probes about patients of stage 2 are left out."
    return records.where(~(labelled | probes) | tunes), told


def _studies(count: int) -> str:
    return f"{count} labelled {'study' if count == 1 else 'studies'}"


def _patients(count: int) -> str:
    return f"{count} patient{'' if count == 1 else 's'}"
