"""A picture of the same studies before training and after each stage, with their boxes: for a README, a talk, or a look at a run.

The studies are not hand-picked: they are evenly spaced in the order of the last stage's IoU, from best to worst.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.commands.report.pictures import SeenImage, see
from umed_plugin.commands.report.run_folder import read_run, stage_label
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe_cases import Case, cases_of
from umed_plugin.grounding.boxes import Box

COLUMNS = 6
_DPI = 140
# Of the PNG's palette: with all shades of noisy grey images the file would be several times as large.
_GREYS, _SHADES = 32, 8
_TRUE: dict[str, Any] = {"edgecolor": "#f0e442", "linewidth": 1.4}
_PREDICTED: dict[str, Any] = {"edgecolor": "#ff7a33", "linewidth": 1.6, "linestyle": (0, (3.2, 1.2))}


def write_before_after(run_dir: Path | str, file: Path | str, columns: int = COLUMNS) -> Path:
    """Write the picture of a run as PNG, a row for each of its evaluations; returns its path.

    Args:
        run_dir: folder of `umed demo` or `umed upgrade`.
        file: the PNG.
        columns: number of studies at most, all with a lesion.

    Raises:
        UmedError: fewer than two stages were evaluated, they share no study with a lesion, or an image cannot be read.
    """
    run, file = read_run(run_dir), Path(file)
    if len(run.evaluations) < 2:
        stages = ", ".join(run.evaluations) or "none"
        raise UmedError(f"{run.folder}: before and after need two evaluations in evaluation/; found: {stages}.")
    chosen = at_even_ranks([cases_of(evaluation) for evaluation in run.evaluations.values()], columns)
    if not chosen:
        raise UmedError(
            f"{run.folder}: {', '.join(run.evaluations)} share no study with a lesion, so there is nothing to draw."
        )
    figure = _drawn(list(zip(*chosen)), [stage_label(name) for name in run.evaluations], run.folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, file)
    return file


def at_even_ranks(evaluations: Sequence[Sequence[Case]], count: int) -> list[tuple[Case, ...]]:
    """``count`` studies, each as all evaluations saw it: the middle ones of ``count`` equal parts, by last IoU, best first."""
    *earlier, last = ({case.id: case for case in cases} for cases in evaluations)
    shared = [case for case in last.values() if case.true_boxes and all(case.id in cases for cases in earlier)]
    shared.sort(key=lambda case: (-case.set_iou, case.id))
    count = min(count, len(shared))
    taken = [shared[int((part + 0.5) * len(shared) / count)] for part in range(count)]
    return [(*(cases[case.id] for cases in earlier), case) for case in taken]


def _drawn(rows: Sequence[Sequence[Case]], labels: Sequence[str], run_folder: Path) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = len(rows[0])
    figure = Figure(figsize=(1.5 * columns + 0.6, 2 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for title, label, row, axes_row in zip(("before", *["after"] * len(rows)), labels, rows, grid):
        axes_row[0].set_ylabel(f"{title}\n({label})", fontsize=10, labelpad=6)
        for axes, case in zip(axes_row, row):
            _draw(axes, case, see(case.image, case.image_aspect_ratio, case.reading, run_folder))
    for axes, case in zip(grid[0], rows[0]):
        axes.set_title("\n".join(dict.fromkeys(case.true_classes)), fontsize=9, fontweight="bold", parse_math=False)
    boxes = [
        Patch(facecolor="#555555", label="true box", **_TRUE),
        Patch(facecolor="#555555", label="box in the answer", **_PREDICTED),
    ]
    figure.legend(
        handles=boxes,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10,
        handleheight=1.2,
        handlelength=2.6,
    )
    return figure


def _draw(axes: Any, case: Case, seen: SeenImage) -> None:
    """One study as the model sees it, with its boxes; below it, how the answer scores."""
    # Everything is in 0-1 of the square, the unit of the boxes.
    axes.imshow(seen.square, extent=(0, 1, 1, 0), interpolation="bilinear")
    for style, boxes in ((_TRUE, case.true_boxes), (_PREDICTED, case.boxes)):
        for box in seen.boxes01(boxes):
            _outline(axes, box, style)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    named = "phrase" if case.accuracy is None else "right class" if case.accuracy == 1 else "wrong class"
    overlap = f"IoU {case.set_iou:.2f}" if case.boxes else "no box"
    axes.set_xlabel(f"{named}\n{overlap}", fontsize=9, labelpad=3)


def _outline(axes: Any, box: Box, style: dict[str, Any]) -> None:
    """A box with a dark outline under its own, visible on white and on black."""
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    for look in ({"edgecolor": "black", "linewidth": style["linewidth"] + 1.4, "alpha": 0.6}, style):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **look))


def _save(figure: Any, file: Path) -> None:
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI, facecolor="white")
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(palette=_palette(), dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)


def _palette() -> Any:
    """Even greys, and the boxes' colours in steps from black and to white for anti-aliased edges."""
    import numpy as np
    from matplotlib.colors import to_rgb
    from PIL import Image

    colours = [np.full(3, value) for value in np.linspace(0, 1, _GREYS)]
    for box in (_TRUE, _PREDICTED):
        colour = np.array(to_rgb(box["edgecolor"]))
        for share in np.linspace(1, 0, _SHADES, endpoint=False):
            colours += [share * colour, share * colour + 1 - share]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.round(255 * np.array(colours)).astype(np.uint8).tobytes())
    return palette
