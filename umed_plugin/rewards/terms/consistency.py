"""Whether an answer agrees with itself; what is checked stands in `umed_plugin.grounding.consistency`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_diagnosis
from umed_plugin.grounding.consistency import consistency_of
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.rewards.contract import register_reward


@register_reward("consistency", applies_to=asks_for_diagnosis)
def consistency(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """Share of the checks that hold, of those that apply to the answer, in 0..1; ``None`` where none applies.

    An answer that claims nothing abnormal where there is something has ``None`` too, or it would be the safest answer to all.

    Example:
        >>> study = {"terms": {"cyst": ["cyst"]}, "objects": {"bbox": [[10, 20, 30, 40]]}}
        >>> one = "Two lesions: a cyst at [0.10, 0.20, 0.30, 0.40]"
        >>> answers = [f"{one}.", f"{one}, a cyst at [0.60, 0.20, 0.90, 0.40]."]
        >>> consistency(["Where?"] * 2, answers, record=[study] * 2, geometry=[ImageGeometry(100, 100)] * 2)
        [0.75, 1.0]
    """
    return [consistency_of(*answer) for answer in zip(completions, record, geometry)]
