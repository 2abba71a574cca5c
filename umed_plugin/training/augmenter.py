"""``--umed_augment``: which form of a record an epoch shows, and its pixels.

A data loader hands its workers indices alone. So an index also says the epoch: record ``i`` of ``n`` in epoch ``e`` is ``i + e *
n``. What an epoch shows then depends on seed, epoch and record, and not on who reads it.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from umed_plugin.data.augmentation.pixels import augment_pixels
from umed_plugin.data.augmentation.study import Study, augmented_study
from umed_plugin.data.images import shown_size
from umed_plugin.data.records import Record, record_faults, record_geometry
from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.geometry import ImageGeometry


class Augmenter:
    """Augments the records of a run.

    Args:
        seed: of the run.
        processor: the vision tower's image processor.
        mode: LLaVA's ``--image_aspect_ratio``.
    """

    def __init__(self, seed: int, processor: Any, mode: str) -> None:
        self.seed, self.processor, self.mode = seed, processor, mode

    def study(self, record: Record, epoch: int, index: int) -> Study:
        """The record as an epoch, counted from 0, shows it; ``index`` names one without an id."""
        return augmented_study(record, self.seed, epoch, name=str(index))

    def pixels(self, image: torch.Tensor, study: Study, path: str) -> torch.Tensor:
        """The study's image, float32 [3, S, S], from the record's own as the processor gives it, read from ``path``."""
        if not study.changed:
            return image
        return augment_pixels(image, self._content(study, path), study.move, study.grey, self.processor)

    def _content(self, study: Study, path: str) -> Optional[Box]:
        """Where the image lies in the square, in 0-1; None: everywhere."""
        if not record_faults(study.record):
            geometry = record_geometry(study.record)
        elif self.mode == "pad":
            # A plain LLaVA item does not say how large its image is.
            width, height = shown_size(path, study.record.get("reading"))
            geometry = ImageGeometry(width, height, "pad")
        else:
            return None
        return geometry.to_square([(0, 0, geometry.width, geometry.height)])[0]
