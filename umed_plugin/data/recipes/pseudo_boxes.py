"""How images that have a label and no box get pseudo-boxes: ``pseudo_boxes:`` in a recipe."""

from __future__ import annotations

from typing import Optional

from pydantic import Field, field_validator

from umed_plugin.data.recipes.options import compiled
from umed_plugin.faults import StrictModel

NEGATIVES = "negatives"
FEWEST_NORMALS = 4


class PseudoBoxRule(StrictModel):
    """Boxes for images that have a label and no box, from an anomaly map of the checkpoint's vision tower."""

    normal: str = Field(
        NEGATIVES,
        description="Images without a lesion, of which the map learns what is normal: ``negatives`` for all that the recipe has "
        "in its train split, or a regular expression on their path under the data root.",
    )
    shots: int = Field(
        16,
        ge=FEWEST_NORMALS,
        description="Number of normal images for each modality, from as many patients as possible. A fifth of them, and 2 at "
        "least, is not trained on.",
    )
    seed: int = Field(
        0, ge=0, description="Seed of the choice of normal images, of the drawn anomalies and of the map's weights."
    )
    steps: int = Field(300, ge=0, description="Training steps of the map, 16 images each.")
    peak_share: float = Field(
        0.6,
        gt=0,
        le=1,
        description="The box is the extent of the region around the map's peak that is at least ``level + peak_share * (peak - "
        "level)``. ``level`` is the 0.99 quantile of the map on normal images.",
    )
    least_score: Optional[float] = Field(
        None,
        ge=0,
        le=1,
        description="Images whose peak is below this get no box and are left out. Without this key: the highest peak on the "
        "normal images that the map was not trained on.",
    )

    @field_validator("normal")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        compiled(value)
        return value
