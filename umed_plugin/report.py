"""Before and after, for people: a table for the terminal and a picture of studies with their boxes.

How to run: both are made by ``umed demo`` (``cases.png`` in its folder).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.evaluate import METRICS, Case

COLOURS = {
    "true": (0, 230, 0),
    "base": (150, 150, 150),
    "instruction_tuning": (255, 170, 0),
    "rewarding": (70, 150, 255),
}
SIDE, FOOT = 260, 34

Boxes = Sequence[Sequence[float]]


def stages_table(stages: Mapping[str, Mapping[str, Any]], comparison: Mapping[str, Any] | None = None) -> Any:
    """A rich table: one row a metric, one column a stage, values with their 95 % intervals.

    Args:
        stages: name -> metrics as `umed_plugin.evaluate.metrics` gives them.
        comparison: what `umed_plugin.evaluate.compare` gives for the last two stages; adds a column.
    """
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    for name, found in stages.items():
        table.add_column(f"{name.replace('_', ' ')}\n(n = {found['n']})", justify="right")
    if comparison:
        before, after = list(stages)[-2:]
        table.add_column(f"{after.replace('_', ' ')} -\n{before.replace('_', ' ')}", justify="right")
    for metric in METRICS:
        cells = [_cell(found[metric], found[f"{metric}_ci95"]) for found in stages.values()]
        if comparison:
            cells.append(_cell(comparison[metric]["difference"], comparison[metric]["ci95"], "+.3f"))
        table.add_row(metric, *cells)
    return table


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def draw_case(image: Path | str, true: Boxes, predicted: Mapping[str, Boxes], path: Path | str | None = None) -> Any:
    """Draw one study with its boxes; returns the PIL picture, and writes it to ``path`` if given.

    Args:
        image: file of the study.
        true: boxes in pixels of that file, drawn in green.
        predicted: name -> boxes in the same pixels; the names in `COLOURS` have their own colours.
        path: where to write a PNG.
    """
    from PIL import Image, ImageDraw

    picture = Image.open(image).convert("RGB")
    scale = SIDE / max(picture.size)
    shown = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    canvas = Image.new("RGB", (SIDE, SIDE))
    left, top = (SIDE - shown.width) // 2, (SIDE - shown.height) // 2
    canvas.paste(shown, (left, top))
    pen = ImageDraw.Draw(canvas)
    for name, boxes in {"true": true, **predicted}.items():
        for box in boxes:
            x1, y1, x2, y2 = (value * scale for value in box)
            # A malformed or inverted box cannot be drawn; the caption still gives the answer's score.
            if x2 > x1 and y2 > y1:
                pen.rectangle(
                    (left + x1, top + y1, left + x2, top + y2), outline=COLOURS.get(name, (255, 0, 255)), width=2
                )
    if path is not None:
        canvas.save(path)
    return canvas


def draw_cases(stages: Mapping[str, Sequence[Case]], path: Path | str, *, count: int = 12, columns: int = 4) -> Path:
    """Write a grid of studies with the boxes of the truth and of every stage; a line under each names truth and IoU.

    Args:
        stages: name -> cases, the same studies in the same order.
        path: of the PNG.
        count: number of studies, taken at even distances.
        columns: studies in a row.
    """
    from PIL import Image, ImageDraw

    first = next(iter(stages.values()))
    chosen = sorted({index * len(first) // count for index in range(min(count, len(first)))})
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * SIDE, rows * (SIDE + FOOT) + FOOT), (25, 25, 25))
    pen = ImageDraw.Draw(sheet)
    at = 6
    for name in ("true", *stages):
        pen.text((at, 10), f"[] {name.replace('_', ' ')}", fill=COLOURS.get(name, (255, 0, 255)))
        at += 160
    for place, index in enumerate(chosen):
        x, y = place % columns * SIDE, FOOT + place // columns * (SIDE + FOOT)
        case = first[index]
        sheet.paste(
            draw_case(case.image, case.true_boxes, {n: cases[index].boxes for n, cases in stages.items()}), (x, y)
        )
        pen.text((x + 6, y + SIDE + 3), f"{', '.join(case.true_classes) or 'no abnormality'}", fill=COLOURS["true"])
        overlaps = "  ".join(f"{cases[index].set_iou:.2f}" for cases in stages.values())
        pen.text((x + 6, y + SIDE + 17), f"IoU {overlaps}", fill=(200, 200, 200))
    path = Path(path)
    sheet.save(path)
    return path
