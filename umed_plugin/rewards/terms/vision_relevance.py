"""Vision Relevance Reward (VRR) of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.data.records import true_boxes
from umed_plugin.grounding.answer_types import asks_for_boxes, asks_for_names
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.phrases import phrase_spans
from umed_plugin.rewards.contract import register_reward


def even_share(
    *, record: Sequence[Mapping[str, Any]], geometry: Sequence[ImageGeometry], **columns: Any
) -> list[float]:
    """The attention on the lesion, in 0..1, of a token that looks at all patches alike: the lesion's share of the patches."""
    shares: dict[tuple[int, int], float] = {}  # the K candidates of a question share record and geometry
    for study, in_square in zip(record, geometry):
        if (id(study), id(in_square)) not in shares:
            shares[id(study), id(in_square)] = float(in_square.patch_cover(true_boxes(dict(study))).mean())
    return [shares[id(study), id(in_square)] for study, in_square in zip(record, geometry)]


@register_reward("vision_relevance", max_normalised=True, scale=even_share, applies_to=asks_for_boxes)
def vision_relevance(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    attention_on_lesion: Sequence[float | None],
    **columns: Any,
) -> list[float | None]:
    """Attention on the lesion's patches by the tokens that name the abnormality, in 0..1 (:mod:`umed_plugin.model.attention`).

    0 when no token names it. ``None`` for a study without abnormality: it has no lesion patches. The scale is the even share, so
    that a small lesion, which can only draw little attention, is divided by its maximum as a large one is.

    Of a phrase the tokens are those that repeat its words; ``None`` for an answer that repeats none, because it need not.
    """
    answers = zip(attention_on_lesion, completions, record)
    return [share if _looks(text, study) else None for share, text, study in answers]


def _looks(text: str, study: Mapping[str, Any]) -> bool:
    if not asks_for_names(study):
        return bool(phrase_spans(text, study["phrase"]))
    return bool(study["objects"]["bbox"])
