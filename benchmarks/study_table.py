"""What the rows of a study say: a table with paired intervals, and the figure of gains against the number of labelled studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

from intervals import differences, mean_difference
from study_plan import BASE, Cell, Study, cells, compared_with
from study_rows import GROUP, Rows

from umed_plugin.evaluation.metrics.metric import Row
from umed_plugin.evaluation.tables import formatted

SHOWN = {"accuracy": "accuracy", "mean IoU": "mean_iou", "vision relevance": "vision_relevance"}
COMPARED = ("accuracy", "mean IoU")
# Groups of the held-out studies, where a class or a source was held out of training, and what the table calls them.
PARTS = {"held_out": "held out of training", "seen": "seen in training"}
# Question -> its group: seed and id -> a key of PARTS.
Groups = Mapping[tuple[int, str], str]


class Scores:
    """The scored questions of cells, of one part of the held-out studies.

    Args:
        rows: of the study.
        groups: of the questions, from the variants that hold something out. They count in the other variants too.
        part: a key of `PARTS`; None: all studies.
    """

    def __init__(self, rows: Rows, groups: Groups | None = None, part: Optional[str] = None) -> None:
        self.rows, self.groups, self.part = rows, groups or {}, part

    def of(self, cell: Cell) -> Optional[list[Row]]:
        """Of a finished cell; None for others."""
        found = self.rows.scores(cell)
        if found is None or self.part is None:
            return found
        return [row for row in found if self.groups.get((cell.seed, row.id)) == self.part]

    def pooled(
        self, pairs: Sequence[tuple[Cell, Cell]], key: str
    ) -> tuple[Optional[float], Optional[list[float]], int]:
        """Mean of ``after - before`` over the questions of all pairs, its interval, and the number of pairs with rows."""
        found: list[Row] = []
        counted = 0
        for before, after in pairs:
            scores = self.of(before), self.of(after)
            if scores[0] is not None and scores[1] is not None:
                counted += 1
                found += differences(key, scores[0], scores[1], after.seed)
        return (*mean_difference(found), counted) if found else (None, None, counted)


def groups_of(study: Study, rows: Rows, seeds: Sequence[int]) -> Groups:
    """The groups of all questions that some finished cell names. Variants are asked the same questions."""
    found: dict[tuple[int, str], str] = {}
    for cell in cells(study, seeds, study.sizes):
        found |= {(cell.seed, row.id): row.groups[GROUP] for row in rows.scores(cell) or [] if GROUP in row.groups}
    return found


def markdown(study: Study, rows: Rows, seeds: Sequence[int]) -> str:
    """The tables, one for each number of labelled studies, and which cells are missing.

    Each line has the means over the seeds that are finished. Differences are paired, with 95 % intervals over patients. Where a
    variant holds something out of training, each arm has a line for the studies that show it, and one for the others.
    """
    parts, missing = [f"### {study.title}", "", study.question], []
    groups = groups_of(study, rows, seeds)
    grouped = {seed for seed, _ in groups}
    for size in sorted(study.sizes):
        lines = []
        for variant, about in study.variants.items():
            for arm in about.arms or study.arms:
                found = [Cell(seed, size, variant, arm) for seed in seeds]
                missing += [cell for cell in found if not rows.has(cell)]
                finished = [cell for cell in found if rows.has(cell)]
                for part in PARTS if groups else [None]:
                    shown = [cell for cell in finished if part is None or cell.seed in grouped]
                    if shown:
                        lines.append(_line(study, Scores(rows, groups, part), variant, shown))
        if lines:
            of = f"{COMPARED[0]} | {COMPARED[1]}"
            heads = [
                "arm",
                "seeds",
                *SHOWN,
                f"from its start: {of}",
                f"against {study.against or '(none)'}: {of}",
                "processor s",
            ]
            head = " | ".join(heads)
            count = head.count("|") + 1
            parts += ["", f"**{size} labelled studies**", "", f"| {head} |", f"|{'---|' * count}", *lines]
            parts += _between_variants(study, rows, seeds, size, groups)
    parts += ["", _missing(missing)]
    return "\n".join(parts)


def _between_variants(study: Study, rows: Rows, seeds: Sequence[int], size: int, groups: Groups) -> list[str]:
    """What a variant has changed: each of its arms minus the same arm of the first variant; by group where one is held out."""
    first, *others = study.variants
    lines = []
    for variant in others:
        for arm in study.variants[variant].arms or study.arms:
            pairs = [(Cell(seed, size, first, arm), Cell(seed, size, variant, arm)) for seed in seeds]
            for part in PARTS if groups else [None]:
                found = [Scores(rows, groups, part).pooled(pairs, SHOWN[metric]) for metric in COMPARED]
                if found[0][2]:
                    shown = " | ".join(formatted(value, interval, "+.3f") for value, interval, _ in found)
                    studies = "all" if part is None else PARTS[part]
                    lines.append(f"| {arm}, {variant} | {studies} | {found[0][2]} | {shown} |")
    if not lines:
        return []
    head = ["", f"| minus the same arm, {first} | studies | seeds | {' | '.join(COMPARED)} |", "|---|---|---|---|---|"]
    return [*head, *lines]


def _missing(missing: Sequence[Cell]) -> str:
    if not missing:
        return "All cells are finished."
    by_size: dict[int, list[str]] = {}
    for cell in sorted(missing, key=lambda cell: cell.size):
        names = by_size.setdefault(cell.size, [])
        label = f"{_label(cell)} (seed {cell.seed})"
        names.append(label)
    listed = "; ".join(f"{size}: {len(names)}" for size, names in by_size.items())
    return f"Not yet made, by number of labelled studies: {listed}."


def _label(cell: Cell) -> str:
    return cell.arm if cell.variant == "plain" else f"{cell.arm}, {cell.variant}"


def _line(study: Study, of: Scores, variant: str, finished: Sequence[Cell]) -> str:
    about = [of.rows.read(cell) or {} for cell in finished]
    scores = [of.of(cell) or [] for cell in finished]
    label = _label(finished[0]) if of.part is None else f"{_label(finished[0])}: {PARTS[of.part]}"
    columns = [label, ", ".join(str(cell.seed) for cell in finished)]
    for key in SHOWN.values():
        values = [row.values[key] for of_cell in scores for row in of_cell if key in row.values]
        columns.append(f"{fmean(values):.3f}" if values else "-")
    arm = study.arms[finished[0].arm]
    starts = [(Cell(cell.seed, cell.size, variant, arm.start), cell) for cell in finished if arm.start != BASE]
    against = [(other, cell) for cell in finished if (other := compared_with(study, cell)) is not None]
    for pairs in (starts, against):
        for metric in COMPARED:
            value, interval, _ = of.pooled(pairs, SHOWN[metric])
            columns.append(formatted(value, interval, "+.3f") if pairs else "")
    columns.append(f"{fmean(row['processor_seconds'] for row in about):.0f}")
    return f"| {' | '.join(columns)} |"


def points(study: Study, rows: Rows, seeds: Sequence[int], variant: str, arm: str, key: str) -> list[dict[str, Any]]:
    """For each size with finished pairs: the gain of the arm over ``against``, its interval, and the number of seeds."""
    found = []
    for size in sorted(study.sizes):
        found_cells = [Cell(seed, size, variant, arm) for seed in seeds]
        pairs = [(other, cell) for cell in found_cells if (other := compared_with(study, cell)) is not None]
        value, interval, counted = Scores(rows).pooled(pairs, key)
        if value is not None:
            found.append({"size": size, "gain": value, "ci95": interval, "seeds": counted})
    return found


def draw(study: Study, rows: Rows, seeds: Sequence[int], file: Path) -> bool:
    """Draw the figure; returns whether there was anything to draw."""
    lines = [
        (variant, arm)
        for arm in study.figure
        for variant, about in study.variants.items()
        if about.arms is None or arm in about.arms
    ]
    lines = [line for line in lines if points(study, rows, seeds, *line, "mean_iou")]
    if not lines:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("mean IoU", "accuracy")):
        for number, (variant, arm) in enumerate(lines):
            found = points(study, rows, seeds, variant, arm, SHOWN[metric])
            # Lines at the same size would hide one another's intervals.
            at = [point["size"] * (1 + 0.03 * (number - (len(lines) - 1) / 2)) for point in found]
            gains = [point["gain"] for point in found]
            ends = [point["ci95"] or [point["gain"]] * 2 for point in found]
            below, above = ([abs(gain - end[side]) for gain, end in zip(gains, ends)] for side in (0, 1))
            label = arm if variant == "plain" else f"{arm}, {variant}"
            axes.errorbar(at, gains, [below, above], marker="o", markersize=4, capsize=2, linewidth=1, label=label)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(sorted(study.sizes), [f"{size:,}" for size in sorted(study.sizes)])
        axes.minorticks_off()
        axes.set_xlabel("labelled studies")
        axes.set_ylabel(f"{metric}: gain over {study.against}")
    # Below the axes, where it hides no interval.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=150)
    return True
