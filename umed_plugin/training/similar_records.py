"""``--umed_similar K`` in training: each record's question begins with what its K nearest training studies show.

Records under LLaVA's stock template are asked without: stock LLaVA, which prompts the exported checkpoint so, cannot look
anything up. It then asks as these records asked. So are probes, phrases, and items without true boxes.

The neighbours are found once, before training, with the tower as it is then. The first process writes them to
``OUTPUT_DIR/umed_data/similar-SPLIT.json``; a resumed run reads them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umed_plugin import files
from umed_plugin.data.record_file import JoinedRecords
from umed_plugin.data.records import Record
from umed_plugin.data.similar import Case, Encode, case_of, is_study, make_bank, said_of, with_similar
from umed_plugin.errors import UmedError, note
from umed_plugin.training.feature_cache import weights_digest
from umed_plugin.training.first_process import first_process_does


class SimilarRecords(JoinedRecords):
    """Records, each with what is said before its question.

    Args:
        records: as they are.
        said: for each of them; empty for nothing.
    """

    def __init__(self, records: JoinedRecords, said: Sequence[str]) -> None:
        super().__init__(records.parts)
        self._said = np.array(list(said), dtype=object)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return found if isinstance(index, slice) else with_similar(found, self._said[index])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def where(self, keep: np.ndarray) -> SimilarRecords:
        """As `JoinedRecords.where`."""
        return SimilarRecords(super().where(keep), self._said[keep])


def similar_records(dataset: Any, training_args: Any, split: str, studies: JoinedRecords) -> SimilarRecords:
    """The dataset's records with what is said before each question. All processes must call this.

    Args:
        dataset: a `umed_plugin.training.tuning_data.GroundedDataset` whose records are loaded.
        training_args: LLaVA's, with the flags in ``umed``.
        split: of the dataset's records.
        studies: of the split train, from which the similar ones are taken.

    Raises:
        UmedError: there is no study to take cases from, an image cannot be read, or ZeRO-3 has divided the tower.
    """
    file = Path(training_args.output_dir).resolve() / "umed_data" / f"similar-{split}.json"
    first_process_does(lambda: _find(dataset, studies, file), "find the similar cases")
    said = files.read_object(file)["said"]
    if training_args.process_index == 0:
        told = sum(bool(text) for text in said)
        note(
            f"--umed_similar {dataset.flags.umed_similar}: {told} of {len(said)} records of the split {split} begin with similar "
            f"cases. The others, under the stock template among them, are asked without, as stock LLaVA asks."
        )
    return SimilarRecords(dataset.list_data_dict, said)


def _find(dataset: Any, studies: JoinedRecords, file: Path) -> None:
    """Write what is said before each record's question, unless the file holds it already."""
    tower, count = dataset.data_args.umed_tower, dataset.flags.umed_similar
    if any(hasattr(parameter, "ds_id") for parameter in tower.parameters()):
        raise UmedError("--umed_similar: ZeRO-3 divides the vision tower, which is needed whole. Use ZeRO-2.")
    own = dataset.list_data_dict
    folder = dataset.data_args.image_folder
    asked = [index for index in range(len(own)) if _is_asked(dataset, index, own[index])]
    cases = [case_of(own[index], folder) for index in asked]
    digest = weights_digest(tower)
    taken = [case_of(one, folder) for one in studies if is_study(one)]
    key = hashlib.sha256(repr((count, digest, len(own), asked, cases, taken)).encode())
    try:
        if files.read_object(file)["key"] == key.hexdigest():
            return
    except (UmedError, OSError, KeyError):
        pass  # it is written below
    encode = _encoder(dataset, tower)
    bank = make_bank(studies, folder, encode, kept=file.with_name("similar-bank.npz"), tower=digest)
    said = [""] * len(own)
    for index, text in zip(asked, said_of(cases, bank, encode, count)):
        said[index] = text
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, {"key": key.hexdigest(), "said": said})


def _is_asked(dataset: Any, index: int, record: Record) -> bool:
    return is_study(record) and dataset.template_of(index) == dataset.template


def _encoder(dataset: Any, tower: Any) -> Encode:
    @torch.no_grad()
    def encode(cases: Sequence[Case]) -> np.ndarray:
        pixels = torch.stack([dataset.load_pixels(case.path, case.reading) for case in cases])
        features = tower(pixels.to(device=tower.device, dtype=tower.dtype))
        found: np.ndarray = features.float().mean(dim=1).cpu().numpy()
        return found

    return encode
