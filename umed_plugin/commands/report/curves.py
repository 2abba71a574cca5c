"""A training's metrics as small charts, drawn by matplotlib as SVG in the page's own colours, light or dark.

A metric and its reference (``guard/top_skeleton`` and ``guard/top_skeleton_reference``) share one chart. Points at which a guard
is beyond its limit (`umed_plugin.rewards.guard_limits`) are marked.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umed_plugin.commands.report.run_folder import Training
from umed_plugin.rewards.guard_limits import crossed_limits
from umed_plugin.rewards.guards import QUESTIONS_OVER_HELD_OUT

# Title -> prefixes of metric names. The first group that matches takes the metric.
GROUPS = {
    "Rewards": ("reward/total", "reward/", "weight/"),
    "Held-out studies": ("val/",),
    "Loss": ("loss", "policy_loss", "value_loss", "attention_", "grad_norm", "learning_rate"),
    "KL and policy": (
        "kl",
        "entropy",
        "clip_fraction",
        "value_",
        "returns_",
        "advantage_",
        "explained_",
        "answer_tokens",
    ),
    "Hacking guards": ("guard/", "groups_without_signal", "answers_cut_off", "vision_relevance/"),
    "Other metrics": ("",),
}
# What a reader of a group has to know.
GRPO_LOSS = (
    "GRPO's loss is near 0 in every step, and that is right: the advantages of a question's answers sum to 0, so at the first "
    "update of a step their terms cancel. The gradient does not. Whether the model learns is in the rewards."
)
# Half a line for each metric whose name does not say what it is (`umed_plugin.rewards.guards`, `training.step_metrics`).
MEANINGS = {
    "guard/whole_image_boxes": "share of boxes around nearly the whole image",
    "guard/malformed_boxes": "share of boxes without area or outside of the image",
    "guard/unread_boxes": "boxes per answer whose coordinates cannot be read",
    "guard/box_area_ratio": "area of the answers' boxes over that of the true ones",
    "guard/extra_boxes": "boxes per answer beyond the true number",
    "guard/missing_boxes": "boxes per answer short of the true number",
    "guard/length_ratio": "words of the answers over words of the references",
    "guard/distinct_skeletons": "different wordings over answers, without numbers and class names",
    "guard/top_skeleton": "share of answers with the most frequent wording",
    "guard/distinct_coordinates": "number of different coordinates in all boxes",
    "groups_without_signal": "share of questions whose answers all have the same reward",
    "answers_cut_off": "share of answers that --umed_max_new_tokens ended",
    "vision_relevance/over_uniform": "attention on the lesion over what uniform attention has; 1 is chance",
    "vision_relevance/iou_correlation": "whether answers that look at the lesion also find it, -1 to 1",
    "clip_fraction": "share of tokens whose probability ratio is clipped",
    "entropy": "of the sampled tokens, in nats",
    "kl": "distance from the start of the stage, in nats per token",
}
_UNSCORED = "guard/unscored/"
_NORMS = {
    "max": "divided by the best of the question's answers (localization, vision relevance)",
    "zscore": "standardised over the question's answers",
    "none": "taken as they are",
}
_NOT_SHOWN = {"step", "epoch", "total_flos", QUESTIONS_OVER_HELD_OUT}
_OF_THE_END = "train_"  # what the trainer logs once, at the end
_REFERENCE = "_reference"

# Drawn in these colours, which are then replaced by the page's own, since those change with light and dark mode.
_INK, _LINE, _SECOND, _MARK = "#010203", "#010204", "#010205", "#010206"
_PAGE = {_INK: "currentColor", _LINE: "var(--line)", _SECOND: "var(--second)", _MARK: "var(--alarm)"}
_WIDTH, _HEIGHT = 3.7, 1.9  # inches; 72 SVG units each


def rewards_note(settings: Mapping[str, Any]) -> str:
    """Why ``reward/total`` is not the weighted sum of the other curves, of a training with these flags."""
    how = _NORMS.get(settings.get("umed_reward_norm") or "", "normalised over the question's answers")
    return (
        "reward/total, which the model learns by, cannot be added up from the other curves. Those are the rewards' own scores. "
        f"For the total, the scores of each question are {how}, then weighted and summed. A cut-off answer may lose some of it."
    )


@dataclass(frozen=True)
class Chart:
    """One metric over the steps.

    Attributes:
        name: of the metric in the log.
        svg: the drawing.
        summary: what it shows, in words: caption, and text for screen readers.
        alarm: the limit that it crosses, in words; empty if it does not.
        plot: for the page: ``points`` and ``reference`` as [step, value], and ``x`` and ``y`` as [factor, offset], which turn
            them into units of the drawing.
    """

    name: str
    svg: str
    summary: str
    alarm: str
    plot: dict[str, Any]

    @property
    def meaning(self) -> str:
        """What the metric is, in half a line; empty where its name says it."""
        if self.name.startswith(_UNSCORED):
            return "share of answers that this reward cannot score"
        return MEANINGS.get(self.name, "")

    @property
    def is_zero(self) -> bool:
        """Whether there is nothing to draw: all values are 0, and so are those that they are compared with."""
        return not self.alarm and not any(value for _, value in (*self.plot["points"], *self.plot["reference"]))


def charts_of(training: Training) -> dict[str, list[Chart]]:
    """Group title -> its charts, in the order of `GROUPS`; groups without a chart are left out."""
    grouped: dict[str, list[Chart]] = {title: [] for title in GROUPS}
    names = dict.fromkeys(name for row in training.log for name, value in row.items() if _is_shown(name, value))
    for name in names:
        base = name[: -len(_REFERENCE)]
        if name.endswith(_REFERENCE) and base in names:
            continue
        title = next(title for title, starts in GROUPS.items() if name.startswith(starts))
        grouped[title].append(_chart(name, training))
    for title, charts in grouped.items():
        charts.sort(key=lambda chart: next(i for i, start in enumerate(GROUPS[title]) if chart.name.startswith(start)))
    return {title: charts for title, charts in grouped.items() if charts}


def _is_shown(name: str, value: Any) -> bool:
    return name not in _NOT_SHOWN and not name.startswith(_OF_THE_END) and isinstance(value, (int, float))


def _chart(name: str, training: Training) -> Chart:
    log = training.log
    points, reference = points_of(name, log), points_of(name + _REFERENCE, log)
    limits = {row["step"]: crossed_by[name] for row in log if name in (crossed_by := crossed_limits(row))}
    crossed = [(step, value) for step, value in points if step in limits]
    (first_step, first), (last_step, last) = points[0], points[-1]
    summary = f"{first:.4g} at step {first_step}"
    if len(points) > 1:
        summary += f", {last:.4g} at step {last_step}"
    alarm = ""
    if crossed:
        limit = next(iter(limits.values()))
        alarm = f"{len(crossed)} of {len(points)} points are {limit}"
    svg, scales = _draw(f"{training.name}/{name}", points, reference, crossed)
    return Chart(name, svg, summary, alarm, {"points": points, "reference": reference, **scales})


def points_of(name: str, log: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, value) of a metric; a value that is not finite (a diverged loss) becomes a gap."""
    return [(row["step"], float(row[name]) if math.isfinite(row[name]) else math.nan) for row in log if name in row]


def _draw(
    salt: str,
    points: Sequence[tuple[int, float]],
    reference: Sequence[tuple[int, float]],
    crossed: Sequence[tuple[int, float]],
) -> tuple[str, dict[str, list[float]]]:
    """The chart as an ``<svg>`` element for the page, and the scales of its axes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # The salt makes the names of clip paths unique to this chart, and the same each time.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        marker = "o" if len(points) < 3 else None
        axes.plot(*zip(*points), color=_LINE, linewidth=1.6, marker=marker, markersize=4)
        if reference:
            axes.plot(*zip(*reference), color=_SECOND, linewidth=1.4, linestyle=(0, (4, 2)), label="reference answers")
        if crossed:
            axes.plot(*zip(*crossed), color=_MARK, linestyle="", marker="v", markersize=5.5, label="beyond its limit")
        if reference or crossed:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8, handlelength=1.8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(colors=_INK, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.6)
        axes.set_xlabel("step", color=_INK)
        drawn = io.StringIO()
        figure.savefig(
            drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
        scales = _scales(axes)
    return _for_page(drawn.getvalue()), scales


def _scales(axes: Any) -> dict[str, list[float]]:
    """[factor, offset] from a step and a value to units of the SVG, whose y runs down and which has 72 units an inch."""
    (left, bottom), (right, top) = axes.transData.transform([(0, 0), (1, 1)])
    unit, height = 72 / axes.figure.dpi, 72 * _HEIGHT
    return {"x": [(right - left) * unit, left * unit], "y": [(bottom - top) * unit, height - bottom * unit]}


def _for_page(svg: str) -> str:
    """The element alone, as wide as its container, without ids that other charts also have, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    for drawn, shown in _PAGE.items():
        rest = rest.replace(drawn, shown)
    return f'<svg {view[0] if view else ""} aria-hidden="true" focusable="false">{rest}'
