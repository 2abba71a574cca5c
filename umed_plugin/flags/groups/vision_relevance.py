"""The flags of the attention on a lesion's patches, as a reward and as a loss."""

from __future__ import annotations

from dataclasses import dataclass

from umed_plugin.flags.needs import VISION_RELEVANCE, flag
from umed_plugin.flags.rules import TUNING


@dataclass
class VisionRelevanceFlags:
    """The flags of the attention on a lesion's patches, as a reward and as a loss."""

    umed_attention_loss: float = flag(
        0.0,
        "Weight of a loss that turns the attention of tokens that name a lesion to its patches: the differentiable form of "
        "vision_relevance (A3Tune, arXiv 2505.18503: 0.03). Records without boxes add nothing; 0: no such loss.",
        stage=TUNING,
        least=0,
    )
    umed_vrr_layers: str = flag(
        "all",
        "Layers averaged by vision_relevance and --umed_attention_loss: all, last_half, or a comma list of indices (-1 is the "
        "last).",
        needs=VISION_RELEVANCE,
        pattern=r"all|last_half|\s*-?\d+\s*(,\s*-?\d+\s*)*",
        form="all, last_half, or indices such as 16,20,-1",
    )
    umed_vrr_heads: str = flag(
        "all",
        "Heads averaged by vision_relevance and --umed_attention_loss: all, or a comma list of indices.",
        needs=VISION_RELEVANCE,
        pattern=r"all|\s*\d+\s*(,\s*\d+\s*)*",
        form="all, or indices such as 0,3,17",
    )
    umed_vrr_mask_sinks: float = flag(
        0.0,
        "Exclude attention sinks from vision_relevance and --umed_attention_loss: patches with a hidden value of at least this "
        "many times their root mean square (arXiv 2503.03321: 20; a model of width D has none above sqrt(D)); 0: mask none.",
        needs=VISION_RELEVANCE,
        above=1,
        or_zero=True,
    )
