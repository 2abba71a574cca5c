"""Images that several people read: the boxes of one of them, or their consensus by weighted box fusion.

Three radiologists who mark one nodule are three boxes in the file, and one lesion. Without a rule nobody can know whose boxes are
meant, so that is a fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import real_path
from umed_plugin.data.annotations.merging import has_boxes_of_two_sizes
from umed_plugin.data.recipes.options import ReadersRule
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.errors import unknown_name
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box, iou_matrix

_SHOWN = 5
# Of one image. Each is compared with all lesions so far, and a file of strangers may hold 100,000.
_MOST_BOXES = 1000
_SAME_LESION = 0.5


@dataclass
class Cluster:
    """Boxes of one class that are probably of one lesion.

    Attributes:
        name: their class.
        marks: (reader, box) of each.
        fused: the box of the lesion.
    """

    name: str
    marks: list[tuple[str, Box]] = field(default_factory=list)
    fused: Box = (0.0, 0.0, 0.0, 0.0)

    @property
    def readers(self) -> set[str]:
        """Who marked the lesion."""
        return {reader for reader, _ in self.marks}

    def add(self, reader: str, box: Box) -> None:
        """Add a box, and set ``fused`` to the weighted mean: each reader has the weight 1, which the reader's boxes share."""
        self.marks.append((reader, box))
        counts = Counter(reader for reader, _ in self.marks)
        weights = [1 / counts[reader] for reader, _ in self.marks]
        a, b, c, d = (
            sum(weight * box[side] for weight, (_, box) in zip(weights, self.marks)) / len(counts) for side in range(4)
        )
        self.fused = (a, b, c, d)


def clusters_of(marks: Sequence[tuple[str, str, Box]], iou: float) -> list[Cluster]:
    """Weighted box fusion of boxes without scores.

    In the order of their coordinates, each box joins the lesion of its class whose fused box overlaps it most, if the IoU is
    above ``iou``. Otherwise it begins a new lesion. The order of rows and the names of the readers change nothing.

    Args:
        marks: (class, reader, box) of every box of an image.
        iou: in 0-1.

    Example:
        >>> from umed_plugin.data.annotations.consensus import clusters_of
        >>> marks = [("cyst", "R1", (10, 10, 20, 20)), ("cyst", "R2", (12, 10, 22, 20)), ("cyst", "R2", (50, 50, 60, 60))]
        >>> [(cluster.fused, sorted(cluster.readers)) for cluster in clusters_of(marks, 0.5)]
        [((11.0, 10.0, 21.0, 20.0), ['R1', 'R2']), ((50.0, 50.0, 60.0, 60.0), ['R2'])]
    """
    found: list[Cluster] = []
    for name, reader, box in sorted(marks, key=lambda mark: (mark[2], mark[0], mark[1])):
        same = [cluster for cluster in found if cluster.name == name]
        overlaps = iou_matrix([box], [cluster.fused for cluster in same])[0].tolist() if same else []
        if overlaps and max(overlaps) > iou:
            same[overlaps.index(max(overlaps))].add(reader, box)
        else:
            found.append(Cluster(name))
            found[-1].add(reader, box)
    return found


def one_reading(items: Sequence[Annotated], recipe: Recipe, faults: Faults) -> list[Annotated]:
    """The items with those of one image by several readers made one, as ``annotations.readers`` says.

    It is a fault if several readers read an image and there is no rule.
    """
    rule: Optional[ReadersRule] = recipe.annotations.readers
    names = sorted({item.reader for item in items if item.reader})
    if not names:
        if rule is not None and items:
            faults.no_effect("annotations.readers", "has no effect, since the annotations name no reader")
        return list(items)
    _name_alike(items, recipe)
    images = _by_image(items)
    readings = [group for group in images if len({item.reader for item in group}) > 1]
    if readings:
        _tell_agreement(readings, rule.iou if rule is not None else _SAME_LESION, faults)
    if rule is None:
        if readings:
            faults.add(
                readings[0][1].where,
                f"{len(readings)} of {len(images)} images are read by several readers ({_some(names)}). Say whose boxes count: "
                "annotations.readers: {use: NAME} or {consensus: wbf}",
            )
            return [group[0] for group in images]
        return list(items)
    if rule.use is not None:
        if rule.use not in names:
            faults.add("annotations.readers.use", unknown_name("reader", rule.use, names[:20]))
            return [group[0] for group in images]
        return [item for group in images for item in _of_one(group, rule.use, faults)]
    return [item for group in images for item in _consensus(group, rule, recipe, faults)]


def _name_alike(items: Sequence[Annotated], recipe: Recipe) -> None:
    """Give all names of a class in the annotations the first of them: two readers who write two of them mean one class."""
    first: dict[str, str] = {}
    alike = {written: first.setdefault(lesion.name, written) for written, lesion in recipe.classes.items()}
    for item in items:
        item.classes = [alike.get(name, name) for name in item.classes]


def _by_image(items: Sequence[Annotated]) -> list[list[Annotated]]:
    folders: dict[str, str] = {}
    images: dict[tuple[object, ...], list[Annotated]] = {}
    for item in items:
        images.setdefault((real_path(str(item.image), folders), item.slice, item.phrase), []).append(item)
    return list(images.values())


def _of_one(group: Sequence[Annotated], name: str, faults: Faults) -> list[Annotated]:
    """The items of one reader. An image that nobody is named for stays as it is."""
    kept = [item for item in group if item.reader == name]
    if not any(item.reader for item in group):
        return list(group)
    others = sum(len(item.boxes) for item in group if item.reader != name)
    if others:
        faults.left_out["boxes", f"not by the reader {name!r}; annotations.readers"] += others
    if kept:
        return kept
    return [replace(group[0], boxes=[], classes=[], left_out=f"not read by {name!r}; annotations.readers")]


def _consensus(group: list[Annotated], rule: ReadersRule, recipe: Recipe, faults: Faults) -> list[Annotated]:
    """One item with the lesions that enough readers marked; a negative, or one that is left out, if there is none."""
    if not any(item.reader for item in group):
        return group
    fault = _disagreement(group, recipe)
    if fault:
        faults.add(group[-1].where, fault)
        return [group[0]]
    marks = [(name, item.reader, box) for item in group for box, name in zip(item.boxes, item.classes)]
    clusters = clusters_of(marks, rule.iou)
    kept = [cluster for cluster in clusters if len(cluster.readers) >= rule.at_least]
    alone = len(marks) - sum(len(cluster.marks) for cluster in kept)
    if alone:
        faults.left_out["boxes", f"marked by fewer than {rule.at_least} readers; annotations.readers"] += alone
    fused = sum(len(cluster.marks) for cluster in kept) - len(kept)
    if fused:
        faults.left_out["boxes", "of the same lesion by another reader, fused into one; annotations.readers"] += fused
    item = replace(
        group[0],
        boxes=[cluster.fused for cluster in kept],
        classes=[cluster.name for cluster in kept],
        dropped_boxes=sum(item.dropped_boxes for item in group),
        left_out=next((item.left_out for item in group if item.left_out), ""),
        size=next((item.size for item in group if item.size), None),
        window=next((item.window for item in group if item.window), None),
        reader="",
    )
    if not kept:
        item.left_out = item.left_out or _why_no_negative(group, rule)
    return [item]


def _why_no_negative(group: Sequence[Annotated], rule: ReadersRule) -> str:
    """Why an image without a lesion of the consensus is left out; empty if it is negative."""
    readers = {item.reader for item in group}
    if len(readers) < rule.at_least:
        return f"read by fewer than {rule.at_least} readers; annotations.readers"
    found_something = {item.reader for item in group if item.boxes or item.dropped_boxes}
    if len(readers - found_something) < rule.at_least:
        return f"neither {rule.at_least} readers agree on a lesion, nor {rule.at_least} on none; annotations.readers"
    return ""


def _disagreement(group: Sequence[Annotated], recipe: Recipe) -> str:
    first = group[0]
    if sum(len(item.boxes) for item in group) > _MOST_BOXES:
        return f"{first.image.name} has more than {_MOST_BOXES} boxes, too many for annotations.readers.consensus"
    for item in group[1:]:
        for name in ("split", "patient", "size", "normalised", "window"):
            here, there = getattr(item, name), getattr(first, name)
            if here != there and None not in (here, there):
                return f"{name} of {first.image.name} is {here!r}, and {there!r} in {first.where}"
    if has_boxes_of_two_sizes(group, recipe):
        return f"only some readers state the size of {first.image.name}, and image.other_size scales their boxes"
    return ""


def _tell_agreement(readings: Sequence[list[Annotated]], iou: float, faults: Faults) -> None:
    """Say how far the readers agree: on whether there is a lesion, and on where."""
    agree, mixed, boxes, shared = 0, 0, 0, 0
    for group in readings:
        found = {item.reader for item in group if item.boxes}
        everyone = {item.reader for item in group}
        agree += found in (set(), everyone)
        mixed += bool(found) and found != everyone
        marks = [(name, item.reader, box) for item in group for box, name in zip(item.boxes, item.classes)]
        boxes += len(marks)
        clusters = clusters_of(marks[:_MOST_BOXES], iou)
        shared += sum(len(cluster.marks) for cluster in clusters if len(cluster.readers) > 1)
    faults.remark(
        "agreement",
        f"{len(readings)} images are read by several readers. They agree in {agree} whether there is a lesion; in {mixed} some "
        f"marked one and others none. {shared} of {boxes} boxes are marked by another reader too (same class, IoU > {iou:g})",
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
