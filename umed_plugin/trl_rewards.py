"""Old name of :mod:`umed_plugin.rewards.trl`, kept for one release."""

import warnings

from umed_plugin.rewards.trl import CombinedReward, LesionAttention, completion_text, trl_dataset

__all__ = ["CombinedReward", "LesionAttention", "completion_text", "trl_dataset"]

warnings.warn(
    "umed_plugin.trl_rewards is now umed_plugin.rewards.trl, and the next release removes the old name. Import from there.",
    DeprecationWarning,
    stacklevel=2,
)
