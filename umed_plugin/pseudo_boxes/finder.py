"""Pseudo-boxes for the images of a recipe: which normal images, one map for each modality, boxes that are kept between builds."""

from __future__ import annotations

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from umed_plugin.data.annotations.base import Annotated, AnnotationSet
from umed_plugin.data.normal_images import Group, by_patients_in_turn, enough_normals, normal_images
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.errors import warn
from umed_plugin.files import parse_json
from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.terminal.progress import progress

if TYPE_CHECKING:
    from umed_plugin.data.prepared import Prepared
    from umed_plugin.pseudo_boxes.map_training import TrainedMap
    from umed_plugin.pseudo_boxes.synthesis import Picture
    from umed_plugin.pseudo_boxes.tower import PatchTower

FOLDER = ".umed_pseudo_boxes"
_BATCH = 16


class PseudoBoxes:
    """Finds the pseudo-boxes of a recipe's images: the argument ``find_boxes`` of `umed_plugin.data.build.build_records`.

    Args:
        tower: folder of a LLaVA checkpoint, or of a CLIP vision tower.
        folder: the build's ``out_dir``. Maps and boxes are kept under it, so that an interrupted build goes on, and the next
            build trains no map again whose tower, images and settings are the same.
        sheet: PNG to write with maps and boxes of some images; None writes none.
        device: ``cuda`` or ``cpu``; None: ``cuda`` if there is one.
        shows_progress: show progress bars.
    """

    def __init__(
        self,
        tower: Path | str,
        folder: Path | str,
        *,
        sheet: Path | None = None,
        device: str | None = None,
        shows_progress: bool = False,
    ) -> None:
        from umed_plugin.pseudo_boxes.sheet import Sheet
        from umed_plugin.pseudo_boxes.tower import PatchTower

        self.tower: PatchTower = PatchTower(tower, device)
        self._out, self._kept = Path(folder), Path(folder) / FOLDER
        self._shows_progress = shows_progress
        self._sheet = None if sheet is None else Sheet(sheet)

    def normals(self, normals: Sequence[Annotated]) -> list[Annotated]:
        """The normal images of every recipe and modality: ``shots`` of the train split, from as many patients as possible."""
        return normal_images(normals)

    def __call__(
        self,
        images: Sequence[Prepared],
        normals: Sequence[Prepared],
        annotations: AnnotationSet,
        image_aspect_ratio: str,
    ) -> None:
        """Give boxes to the images that have labels; see `umed_plugin.data.prepared.FindsBoxes`."""
        wanted: dict[Group, list[Prepared]] = defaultdict(list)
        shots: dict[Group, list[Prepared]] = defaultdict(list)
        chosen = {id(item) for item in self.normals(annotations.normals)}
        for image in [*images, *normals]:
            group = (image.item.recipe.name, image.item.modality)
            if id(image.item) in chosen and not image.evaluated:
                shots[group].append(image)
        for image in images:
            if len(image.labels) > 1:
                annotations.left_out["several labels, and one pseudo-box cannot say which it is of"] += 1
            elif image.labels:
                wanted[image.item.recipe.name, image.item.modality].append(image)
        enough = [
            enough_normals(group, [image.item for image in shots[group]], len(wanted[group]), annotations.faults)
            for group in wanted
        ]
        if all(enough):
            for group, labelled in wanted.items():
                self._find(labelled, _in_turn(shots[group]), annotations, image_aspect_ratio)
            if self._sheet is not None:
                self._sheet.save()

    def _find(self, labelled: list[Prepared], shots: list[Prepared], annotations: AnnotationSet, mode: str) -> None:
        recipe = labelled[0].item.recipe
        rule = recipe.pseudo_boxes
        assert rule is not None, "images with labels and no rule are a fault"
        trained = self._map(shots, recipe, mode)
        least = trained.highest if rule.least_score is None else rule.least_score
        kept = _KeptBoxes(self._kept / f"boxes-{trained.key}.jsonl")
        drawn = self._sheet.chosen(labelled) if self._sheet is not None else set()
        low = 0
        with progress(f"{recipe.name}: pseudo-boxes", "image", quiet=not self._shows_progress) as advance:
            for start in range(0, len(labelled), _BATCH):
                batch = labelled[start : start + _BATCH]
                found = self._boxes(batch, trained, rule.peak_share, least, kept, mode, drawn)
                low += _set_boxes(batch, found, least, annotations, mode)
                advance(min(start + _BATCH, len(labelled)), len(labelled))
        if 2 * low > len(labelled):
            annotations.faults.remark(
                "pseudo_boxes",
                f"{low} of {len(labelled)} images with a lesion{_of(labelled)} have no peak above least_score {least:.3f}: the "
                "map does not tell them from normal images. Look at the contact sheet. More shots, or normal images that are "
                "more like them, may help",
            )

    def _map(self, shots: list[Prepared], recipe: Recipe, mode: str) -> TrainedMap:
        from umed_plugin.pseudo_boxes.map_training import MapSettings, trained_map

        rule = recipe.pseudo_boxes
        assert rule is not None
        training, held_out = divided(shots)
        pictures = [[self._picture(image, mode) for image in group] for group in (training, held_out)]
        title = f"{recipe.name}: anomaly map{_of(shots)}"
        with progress(title, "step", quiet=not self._shows_progress) as advance:
            settings = MapSettings(seed=rule.seed, steps=rule.steps)
            return trained_map(self.tower, pictures[0], pictures[1], settings, self._kept, advance)

    def _picture(self, image: Prepared, mode: str) -> Picture:
        from umed_plugin.data.images.drawing import read_pixels

        path = image.item.image if image.by_llava else self._out / image.rendered
        return self.tower.picture(read_pixels(path), ImageGeometry(*image.size, mode))

    def _boxes(
        self,
        batch: list[Prepared],
        trained: TrainedMap,
        peak_share: float,
        least: float,
        kept: _KeptBoxes,
        mode: str,
        drawn: set[int],
    ) -> list[tuple[Optional[Box], float]]:
        """The box of each image in 0-1 of the square (None: nothing stands out), and its score."""
        from umed_plugin.pseudo_boxes.box_rule import box_of
        from umed_plugin.pseudo_boxes.map_training import picture_digest

        pictures = [self._picture(image, mode) for image in batch]
        keys = [f"{picture_digest(picture)} {peak_share:g}" for picture in pictures]
        missing = [n for n, key in enumerate(keys) if key not in kept or id(batch[n]) in drawn]
        maps = trained.of([pictures[n] for n in missing]) if missing else []
        for n, anomalies in zip(missing, maps):
            box, score = box_of(anomalies, pictures[n].inside, trained.level, peak_share)
            kept.add(keys[n], box, score)
            if self._sheet is not None and id(batch[n]) in drawn:
                self._sheet.add(batch[n], pictures[n], anomalies, box if score >= least else None, score)
        return [kept[key] for key in keys]


def _set_boxes(
    batch: list[Prepared], found: list[tuple[Optional[Box], float]], least: float, annotations: AnnotationSet, mode: str
) -> int:
    """Write the boxes into the images; returns how many get none."""
    low = 0
    for image, (box, score) in zip(batch, found):
        if box is None or score < least:
            low += 1
            annotations.left_out[f"no peak of the anomaly map above least_score {least:.3f}"] += 1
            continue
        (x1, y1, x2, y2) = ImageGeometry(*image.size, mode).from_square([box])[0]
        image.boxes, image.classes, image.labels = [_inside((x1, y1, x2, y2), image.size)], image.labels, []
        image.box_score = round(score, 4)
    return low


def _inside(box: Box, size: tuple[int, int]) -> Box:
    width, height = size
    return (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height)))


def _of(images: Sequence[Prepared]) -> str:
    modality = images[0].item.modality
    return f" of modality {modality}" if modality else ""


def _in_turn(shots: list[Prepared]) -> list[Prepared]:
    """The normal images in the order in which they were chosen, whatever the order of the build."""
    place = {id(item): n for n, item in enumerate(by_patients_in_turn([image.item for image in shots]))}
    return sorted(shots, key=lambda image: place[id(image.item)])


def divided(shots: list[Prepared]) -> tuple[list[Prepared], list[Prepared]]:
    """Those to train on, and a fifth (2 at least) to hold out: patients of their own, as far as that leaves some to train on."""
    wanted = max(2, math.ceil(len(shots) / 5))
    held: list[Prepared] = []
    patients = list(dict.fromkeys(image.item.patient for image in reversed(shots)))
    for patient in patients[:-1]:
        if len(held) >= wanted:
            break
        mine = [image for image in shots if image.item.patient == patient]
        if len(shots) - len(held) - len(mine) >= 2:
            held += mine
    rest = [image for image in shots if image not in held]
    while len(held) < 2 and len(rest) > 2:
        held.append(rest.pop())
    return rest, held


class _KeptBoxes:
    """Boxes and scores by the digest of their image, in a file that grows with each; a damaged line is not used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, tuple[Optional[Box], float]] = {}
        self._cannot_write = False
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            checksum, _, text = line.partition(b" ")
            try:
                if int(checksum, 16) == zlib.crc32(text):
                    key, box, score = parse_json(text)
                    self._found[key] = (None if box is None else (box[0], box[1], box[2], box[3]), score)
            except (ValueError, TypeError, LookupError):
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> tuple[Optional[Box], float]:
        return self._found[key]

    def add(self, key: str, box: Optional[Box], score: float) -> None:
        """Keep what was found for an image, unless it is kept already."""
        if key in self._found:
            return
        self._found[key] = (box, score)
        text = json.dumps([key, box, score]).encode()
        line: Any = b"\n%08x %s\n" % (zlib.crc32(text), text)
        if self._cannot_write:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            self._cannot_write = True
            warn(f"{self._path}: cannot be written ({error.strerror}). The next build finds the boxes again.")
