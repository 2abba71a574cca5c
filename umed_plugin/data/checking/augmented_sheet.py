"""Contact sheets of augmented studies: some studies of every source as ``--umed_augment`` shows them.

Each row has a study as it is, then in the first four epochs that change it, with its boxes and the answer that training would
supervise. Look whether the boxes are on the lesions, whether the words of side are right, and whether such a picture could be a
real one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

from umed_plugin.data.annotations import Annotated
from umed_plugin.data.augmentation.study import Study, augmented_study
from umed_plugin.data.checking.contact_sheet import chosen_items, colour_of
from umed_plugin.data.prepared import Prepared
from umed_plugin.data.record_writer import written_record
from umed_plugin.data.records import true_boxes
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import is_degenerate
from umed_plugin.grounding.geometry import ImageGeometry

_SIDE, _GAP, _SHOWN, _STUDIES = 240, 6, 4, 6
_EPOCHS = 50  # in which a change is looked for: a recipe may change few studies, or none
_LINES, _LINE = 11, 12  # of the caption, and the height of one in pixels
_WORDS = 40  # characters in a line of the caption
# CLIP's mean, which LLaVA pads with. Boxes and text do not depend on it.
_MEAN = (0.48145466, 0.4578275, 0.40821073)


class AugmentedSheets:
    """Selects studies of every source, always the same ones, and draws them.

    Args:
        items: of the recipe. Studies of the split train are chosen where there are any: only these are augmented.
    """

    def __init__(self, items: Sequence[Annotated]) -> None:
        self._wanted: set[int] = set()
        self._rows: dict[str, list[list[Image.Image]]] = {}
        for source in {item.recipe.name for item in items}:
            own = [item for item in items if item.recipe.name == source]
            trained = [item for item in own if item.split == "train"]
            self._wanted |= {id(item) for item in chosen_items(trained or own, _STUDIES)[:_STUDIES]}

    def add(self, prepared: Prepared) -> None:
        """Draw an image if it is selected, and the template writer can write its answer."""
        if id(prepared.item) not in self._wanted:
            return
        geometry = ImageGeometry(*prepared.size)
        try:
            record = written_record(prepared, None, geometry, 2, 0)
        except UmedError:
            return
        epochs = (augmented_study(record, 0, epoch) for epoch in range(_EPOCHS))
        changed = islice((study for study in epochs if study.changed), _SHOWN)
        row = [_tile(study, prepared, geometry) for study in (Study(record), *changed)]
        self._rows.setdefault(prepared.item.recipe.name, []).append(row)

    def save(self, folder: Path) -> dict[str, Path]:
        """Write one PNG per source into the folder, and return source -> file."""
        written: dict[str, Path] = {}
        for source, rows in sorted(self._rows.items()):
            width, height = rows[0][0].size
            size = ((1 + _SHOWN) * (width + _GAP), len(rows) * (height + _GAP))
            sheet = Image.new("RGB", size, "white")
            for y, row in enumerate(rows):
                for x, tile in enumerate(row):
                    sheet.paste(tile, (x * (width + _GAP), y * (height + _GAP)))
            written[source] = folder / f"augmented_{source}.png"
            sheet.save(written[source])
        return written


def _tile(study: Study, prepared: Prepared, geometry: ImageGeometry) -> Image.Image:
    """The square with outlines around the boxes, and the movement and the answer below."""
    tile = Image.new("RGB", (_SIDE, _SIDE + _LINES * _LINE + 4), (32, 32, 32))
    tile.paste(Image.fromarray(_picture(study, prepared.shown, geometry)))
    draw = ImageDraw.Draw(tile)
    refs = study.record["objects"]["ref"]
    for ref, box in zip(refs, geometry.to_square(true_boxes(study.record))):
        if not is_degenerate(box):
            left, top, right, bottom = (value * _SIDE for value in box)
            outline = colour_of(ref, prepared.item.recipe.names)
            draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=outline)
    answer = textwrap.wrap(study.record["conversations"][1]["value"], _WORDS, max_lines=_LINES - 1, placeholder=" ...")
    for number, line in enumerate([_movement(study), *answer]):
        fill = (255, 200, 90) if number == 0 else (220, 220, 220)
        draw.text((4, _SIDE + 2 + number * _LINE), line, fill=fill)
    return tile


def _picture(study: Study, shown: np.ndarray, geometry: ImageGeometry) -> np.ndarray:
    """uint8 [_SIDE, _SIDE, 3]."""
    import torch

    from umed_plugin.data.augmentation.pixels import augment_pixels

    longer = max(geometry.width, geometry.height)
    square = Image.new("RGB", (longer, longer), tuple(int(value * 255) for value in _MEAN))
    corner = ((longer - geometry.width) // 2, (longer - geometry.height) // 2)
    square.paste(Image.fromarray(np.ascontiguousarray(shown)), corner)
    pixels = np.asarray(square.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    mean = np.array(_MEAN, dtype=np.float32)
    image = torch.from_numpy(np.ascontiguousarray((pixels - mean).transpose(2, 0, 1)))
    (content,) = geometry.to_square([(0, 0, geometry.width, geometry.height)])
    processor = SimpleNamespace(image_mean=list(_MEAN), image_std=[1.0] * 3)
    moved = augment_pixels(image, content, study.move, study.grey, processor).numpy().transpose(1, 2, 0) + mean
    return np.rint(moved.clip(0, 1) * 255).astype(np.uint8)


def _movement(study: Study) -> str:
    move = study.move
    mirrored = "both ways" if move.left_right and move.up_down else "left-right" if move.left_right else "up-down"
    parts = [f"mirrored {mirrored}"] if move.mirrors else []
    parts += [f"{move.angle:+.0f} deg, zoom {move.zoom:.2f}"] if move.resamples else []
    parts += [] if parts or not study.changed else ["grey levels"]
    return "; ".join(parts) or "as it is"
