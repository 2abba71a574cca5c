"""``--umed_augment``: which form of a record an epoch shows, and its pixels.

A data loader hands its workers indices alone. So an index also says the epoch: record ``i`` of ``n`` in epoch ``e`` is ``i + e *
n``. What an epoch shows then depends on seed, epoch and record, and not on who reads it.
"""

from __future__ import annotations

from typing import Any

import torch

from umed_plugin.data.augmentation.pixels import augment_pixels
from umed_plugin.data.augmentation.study import Study, augmented_study
from umed_plugin.data.records import Record, record_faults, record_geometry


class Augmenter:
    """Augments the records of a run.

    Args:
        seed: of the run.
        processor: the vision tower's image processor.
    """

    def __init__(self, seed: int, processor: Any) -> None:
        self.seed, self.processor = seed, processor

    def study(self, record: Record, epoch: int, index: int) -> Study:
        """The record as an epoch, counted from 0, shows it; ``index`` names one without an id."""
        return augmented_study(record, self.seed, epoch, name=str(index))

    def pixels(self, image: torch.Tensor, study: Study) -> torch.Tensor:
        """The study's image, float32 [3, S, S], from the record's own as the processor gives it."""
        if not study.changed:
            return image
        content = None
        if not record_faults(study.record):
            geometry = record_geometry(study.record)
            (content,) = geometry.to_square([(0, 0, geometry.width, geometry.height)])
        return augment_pixels(image, content, study.move, study.grey, self.processor)


def augmentation_in_words(labelled: int, count: int) -> str:
    """What is augmented, as a sentence.

    Args:
        labelled: number of records with true boxes.
        count: number of all records.
    """
    plain = count - labelled
    others = f"; the {plain} without true boxes change their grey levels alone" if plain else ""
    return (
        f"augmentation: each epoch draws anew how {labelled} of {count} records are shown, with their boxes and words of side, "
        f"by their recipe's `augment`, or by its defaults without mirroring{others}."
    )
