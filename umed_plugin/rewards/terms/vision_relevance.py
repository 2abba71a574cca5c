"""Vision Relevance Reward (VRR) of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.rewards.contract import register_reward


@register_reward("vision_relevance", max_normalised=True)
def vision_relevance(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    attention_on_lesion: Sequence[float | None],
    **columns: Any,
) -> list[float | None]:
    """Attention on the lesion's patches by the tokens that name the abnormality, in 0..1 (:mod:`umed_plugin.model.attention`).

    0 when no token names it. ``None`` for a study without abnormality: it has no lesion patches.
    """
    return [share if study["objects"]["bbox"] else None for share, study in zip(attention_on_lesion, record)]
