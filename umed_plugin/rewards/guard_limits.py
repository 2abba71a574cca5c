"""Limits of the guards: the value beyond which a metric of `umed_plugin.rewards.guards` is a warning, and what that may mean.

``groups_without_signal`` and ``answers_cut_off`` of `umed_plugin.training.step_metrics` have limits here too; they are means
since the last log. The first one's limit is for GRPO alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_UNSCORED = "guard/unscored/"
_BY_HEART = (
    "above 0.2: the policy knows the training studies by heart, and stage 2 can learn little from them. Augment them "
    "(--umed_augment), or train stage 1 longer instead. --umed_label_share keeps some for stage 2, and stage 1 has fewer then"
)

# Metric -> (whether the limit is crossed, given all metrics; the limit in words and what it may mean).
_LIMITS: dict[str, tuple[Callable[[Mapping[str, float]], bool], str]] = {
    "guard/whole_image_boxes": (
        lambda metrics: metrics["guard/whole_image_boxes"] > 0.05,
        "above 0.05: the policy may be learning that a box around the whole image always overlaps",
    ),
    "guard/malformed_boxes": (
        lambda metrics: metrics["guard/malformed_boxes"] > 0.2,
        "above 0.2: boxes lose their form. A lower --learning_rate or a higher --umed_kl_coef keeps the policy closer",
    ),
    "guard/unread_boxes": (
        lambda metrics: metrics["guard/unread_boxes"] > 0.2,
        "above 0.2 per answer: boxes lose their form, or are cut off. Read some answers (--umed_log_candidates), and raise "
        "--umed_max_new_tokens if they end too early",
    ),
    "guard/box_area_ratio": (
        lambda metrics: metrics["guard/box_area_ratio"] > 1.5,
        "above 1.5: boxes hedge by growing. Look at the IoU of held-out studies, and lower --umed_temperature",
    ),
    "guard/extra_boxes": (
        lambda metrics: metrics["guard/extra_boxes"] > 0.5,
        "above 0.5 per answer: boxes are scattered in the hope of a hit",
    ),
    "guard/missing_boxes": (
        lambda metrics: metrics["guard/missing_boxes"] > 0 and metrics.get("guard/distinct_coordinates") == 0,
        "and no answer has a box that can be read: there is nothing to reinforce. Stage 1 is too short, or its data has no "
        "boxes; train it longer before stage 2",
    ),
    "guard/length_ratio": (
        lambda metrics: not 0.5 <= metrics["guard/length_ratio"] <= 1.5,
        "outside 0.5-1.5: answers are padded, or stripped to what is scored. A higher --umed_kl_coef preserves the wording",
    ),
    "guard/iou_over_held_out": (lambda metrics: metrics["guard/iou_over_held_out"] > 0.2, _BY_HEART),
    "guard/accuracy_over_held_out": (lambda metrics: metrics["guard/accuracy_over_held_out"] > 0.2, _BY_HEART),
    "guard/top_skeleton": (
        lambda metrics: metrics["guard/top_skeleton"] > metrics["guard/top_skeleton_reference"] + 0.3,
        "more than 0.3 above top_skeleton_reference: answers are collapsing to one sentence",
    ),
    "answers_cut_off": (
        lambda metrics: metrics["answers_cut_off"] > 0.2,
        "above 0.2: --umed_max_new_tokens ends these answers, perhaps before their box. Raise it if candidates.jsonl shows whole "
        "answers that are only long; if answers do not end at all, --umed_cut_off penalise, the default, teaches them to",
    ),
    "groups_without_signal": (
        lambda metrics: metrics["groups_without_signal"] > 0.95 and learns_within_groups(metrics),
        "above 0.95: the answers to nearly every question have equal rewards, and grpo learns nothing from those. Look at the "
        "single rewards in the log; a higher --umed_temperature or --umed_num_candidates makes answers differ",
    ),
    "guard/distinct_coordinates": (
        lambda metrics: (
            0 < metrics["guard/distinct_coordinates"] < 0.5 * metrics["guard/distinct_coordinates_reference"]
        ),
        "less than half of distinct_coordinates_reference: boxes are collapsing to a few stock ones",
    ),
}


def unscored(reward: str) -> str:
    """The logged name of the share of answers that a reward could not score."""
    return f"{_UNSCORED}{reward}"


def learns_within_groups(metrics: Mapping[str, Any]) -> bool:
    """Whether a line of the log is of GRPO. PPO, which alone has a value loss, learns from differences between questions too."""
    return "value_loss" not in metrics


def crossed_limits(metrics: Mapping[str, float]) -> dict[str, str]:
    """The metrics beyond their limits by logged name, each with its limit in words and what it may mean."""
    found = {name: words for name, (crossed, words) in _LIMITS.items() if name in metrics and crossed(metrics)}
    for name, share in metrics.items():
        if name.startswith(_UNSCORED) and share == 1:
            reward = name[len(_UNSCORED) :]
            found[name] = (
                f"so --umed_rewards {reward} returned None for every answer: the run trains without it. Mend it or remove it"
            )
    return found
