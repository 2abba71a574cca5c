"""The names that ``--umed_rewards`` and ``--umed_judge`` take."""

from __future__ import annotations

import pkgutil
from pathlib import Path

PAPER_REWARDS = ("relevance", "localization", "vision_relevance")
# Each file of that folder is one reward, named as the file. Importing them would import NumPy, so they are only listed.
_REWARD_FILES = Path(__file__).parent.parent / "rewards" / "terms"
SHIPPED_REWARDS = (
    *PAPER_REWARDS,
    *sorted({module.name for module in pkgutil.iter_modules([str(_REWARD_FILES)])} - set(PAPER_REWARDS)),
)

REWARD_NORMS = ("max", "none", "zscore")

# The rewards that are 0 for an answer without a box.
BOX_REWARDS = ("localization", "localization_diou", "localization_curriculum")
# The one shipped reward that needs a file: symbolic:FILE.yaml.
SYMBOLIC = "symbolic"


def is_own_reward(name: str) -> bool:
    """Whether a name of ``--umed_rewards`` is ``my_module:my_reward``, a reward of the user."""
    return ":" in name and not name.startswith(f"{SYMBOLIC}:")


# Shipped rewards that `--umed_reward_norm max` divides; a user's own says so by its attribute `max_normalised`.
MAX_NORMALISED = ("localization", "localization_diou", "vision_relevance")
LOCAL_JUDGE_NAMES = ("lexical", "classes")
OPENAI, REPLAY = "openai", "replay"
