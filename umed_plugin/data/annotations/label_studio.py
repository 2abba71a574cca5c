"""Label Studio's exports JSON and JSON-MIN: regions in percent of the image, one annotation for each annotator of a task."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated, check_normal, drop_box
from umed_plugin.data.annotations.brush import decode_brush
from umed_plugin.data.annotations.cells import name_of
from umed_plugin.data.annotations.finding import ImageFolders, Renamed, json_files
from umed_plugin.data.annotations.shapes import ellipse, extent, numbers, points_of, regions, turned_rectangle
from umed_plugin.data.annotations.studio_images import Group, ImageTags, image_names, region_kind, unread_type
from umed_plugin.data.annotations.studio_tasks import StudioTask, StudioTasks
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box


class LabelStudioOptions(ReaderOptions):
    """Label Studio's JSON or JSON-MIN. Rectangles, polygons, ellipses and brush regions become boxes. Predictions, drafts and
    cancelled annotations are not read; a submitted annotation without a region marks a negative image. Regions of other kinds,
    such as bitmasks, are left out and counted.
    """

    names_images_ = True
    yaml_example_ = """
annotations:
  reader: label_studio
  files: project-1.json
  image_root: images
"""

    in_percent_ = True

    image: str = Field(
        "image",
        description="Field of a task's data that names the image. Of a URL or an upload the path counts, and then the file's "
        "name without the eight letters that Label Studio puts before it.",
    )
    rename: Optional[tuple[str, str]] = Field(
        None,
        description="Regular expression and replacement that turn the image's field into a path, which is tried first.",
    )
    to_name: Optional[str] = Field(
        None,
        description="Where a task shows several images: the image tag of the labelling interface whose regions are read. "
        "Regions, choices and texts of the others are left out. Name the file of the same image by ``image``.",
    )
    patient: Optional[str] = Field(None, description="Field of a task's data that names the patient.")
    no_finding: list[str] = Field(
        [],
        description="Choices that say that the image has no lesion. An annotation that has other choices or texts, and no "
        "region, leaves its image out. Where the key is given, so does one that has neither a region nor one of these choices. A "
        "field of JSON-MIN that holds one of them in any entry is a choice in all entries. Without the key, a text of an entry "
        "of JSON-MIN may be a choice if no entry with a region has its field.",
    )
    brush: Literal["region", "parts"] = Field(
        "region", description="``region``: a brush region is one lesion. ``parts``: each of its connected parts is one."
    )


@register_reader("label_studio", LabelStudioOptions)
def read_label_studio(options: LabelStudioOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read one export per split; each annotator of a task is a reader of its image."""
    items: list[Annotated] = []
    for split, path, content in json_files(options, root, faults):
        if not isinstance(content, list):
            faults.add(
                path, f"holds a {type(content).__name__}; needed: a list of tasks, as the exports JSON and JSON-MIN are"
            )
            continue
        tags = ImageTags(options.to_name, path, faults)
        tasks = StudioTasks(content, path, (options.image, options.patient), options.no_finding, tags, faults)
        export = _Export(options, path, ImageFolders(options, root, split, path.parent, faults), tags, faults)
        for task in tasks.annotations():
            item = export.item(task)
            if item is not None:
                item.split = split
                items.append(item)
        export.tell()
        tasks.tell()
    return items


class _Export:
    """The images of one file, with the boxes of their regions."""

    def __init__(
        self, options: LabelStudioOptions, path: Path, folders: ImageFolders, tags: ImageTags, faults: Faults
    ) -> None:
        self.options, self.path, self.folders, self.tags, self.faults = options, path, folders, tags, faults
        self.names = Renamed(options.rename)
        self.written: dict[Path, str] = {}
        self.parted: list[str] = []

    def tell(self) -> None:
        """Say what may be read otherwise than it was meant."""
        self.names.tell(self.path, self.faults)
        self.tags.tell()
        if self.parted:
            self.faults.remark(
                self.parted[0],
                f"{len(self.parted)} brush regions have several parts, and are read as one lesion each; annotations.brush: parts",
            )

    def item(self, task: StudioTask) -> Optional[Annotated]:
        """The image as one annotator read it; None after a fault."""
        results = self.tags.on_image(task.results, task.data, task.where)
        image = self._image(task)
        if image is None or results is None:
            return None
        item = Annotated(image, [], [], task.where, normalised=True, reader=task.annotator)
        item.patient = name_of(task.data.get(self.options.patient)) if self.options.patient is not None else ""
        others: Counter[str] = Counter()
        for group in results:
            self._add(item, group, others)
        check_normal(item, others, self.options.no_finding, self.faults)
        said = [name for name in others if name not in self.options.no_finding]
        if said and not item.boxes:
            item.left_out = "has choices or texts, but no region; annotations.no_finding"
        elif self.options.no_finding and not (others or item.boxes or item.dropped_boxes):
            item.left_out = "has no region, and none of annotations.no_finding"
        elif task.unclear and not (self.options.no_finding or item.boxes or item.dropped_boxes):
            item.left_out = (
                f"has no region, and {task.unclear!r} may be a choice; annotations.no_finding, or the export JSON"
            )
        if len(results) < len(task.results) and not (item.boxes or others):
            item.left_out = "has regions or choices on other images of its task alone; annotations.to_name"
        return item

    def _image(self, task: StudioTask) -> Optional[Path]:
        written = task.data.get(self.options.image)
        if not isinstance(written, str) or not written.strip() or written.startswith("data:"):
            shown = "an image inside the JSON" if str(written).startswith("data:") else repr(written)
            self.faults.add(
                task.where,
                f"{self.options.image!r} (annotations.image) is {shown}; needed: the image's file. The data holds "
                f"{', '.join(map(str, task.data))}"[:800],
            )
            return None
        renamed = self.names.of(written) if self.options.rename is not None else []
        image = self.folders.find([*renamed[:1], *image_names(written)])
        if self.written.setdefault(image, written) != written:
            self.faults.add(
                task.where,
                f"{written!r} and {self.written[image]!r} both lead to {image}. Tell them apart with annotations.rename",
            )
            return None
        return image

    def _add(self, item: Annotated, group: Group, others: Counter[str]) -> None:
        """Add the boxes of one region, or count what an annotation says without one."""
        values = [result["value"] for result in group if isinstance(result.get("value"), dict)]
        kinds = [region_kind(value) for value in values]
        if not any(kinds):
            unread = next(filter(None, map(unread_type, group)), "")
            if unread:
                drop_box(item, f"{unread}, whose shape is not read", self.faults)
            else:
                others.update(_said(values))
            return
        index = next(index for index, kind in enumerate(kinds) if kind)
        kind, value = kinds[index], values[index]
        labels = list(dict.fromkeys(label for one in values for label in _labels(one)))
        where = f"{item.where} region {group[0].get('id', len(item.boxes))}"
        if kind in ("keypoint", "vector"):
            drop_box(item, f"{kind}, which has no area", self.faults)
            return
        size = numbers([one.get(key) for one in (group[index],) for key in ("original_width", "original_height")])
        if not labels:
            self.faults.add(where, "has no label")
        elif size is None or min(size) < 1:
            self.faults.add(where, "has no original_width and original_height. Export it with a newer Label Studio")
        elif group[index].get("image_rotation") or value.get("image_rotation"):
            self.faults.add(
                where, "was drawn on a turned image (image_rotation). Turn the image itself, and draw it there"
            )
        elif item.size not in (None, (int(size[0]), int(size[1]))):
            self.faults.add(where, f"was drawn on {size[0]:.0f}x{size[1]:.0f}, and another region on {item.size}")
        else:
            item.size = (int(size[0]), int(size[1]))
            self._add_boxes(item, where, kind, value, labels)

    def _add_boxes(self, item: Annotated, where: str, kind: str, value: dict[str, Any], labels: list[str]) -> None:
        width, height = item.size or (1, 1)
        try:
            boxes = self._boxes(where, kind, value, (width, height))
        except ValueError as error:
            self.faults.add(where, f"{kind}: {error}")
            return
        for x1, y1, x2, y2 in boxes:
            for label in labels:
                item.boxes.append((x1 / width, y1 / height, x2 / width, y2 / height))
                item.classes.append(label)

    def _boxes(self, where: str, kind: str, value: dict[str, Any], size: tuple[int, int]) -> list[Box]:
        """The boxes of a region in pixels of the image that it was drawn on."""
        width, height = size
        if kind == "brush":
            layer = decode_brush(value["rle"], width, height)
            parts = [box for box, _ in regions(layer)]
            if not parts:
                raise ValueError("paints no pixel")
            if self.options.brush == "parts":
                return parts
            if len(parts) > 1:
                self.parted.append(where)
            return [extent([point for x1, y1, x2, y2 in parts for point in ((x1, y1), (x2, y2))])]
        if kind == "polygon":
            points = points_of(value["points"])
            if points is None or len(points) < 3:
                raise ValueError("needs three or more points [x, y] in percent")
            return [extent([(x * width / 100, y * height / 100) for x, y in points])]
        sides = ("radiusX", "radiusY") if kind == "ellipse" else ("width", "height")
        found = numbers([value.get(key) for key in ("x", "y", *sides)] + [value.get("rotation") or 0])
        if found is None:
            raise ValueError(f"needs numbers x, y, {', '.join(sides)} in percent")
        x, y, a, b = (part * side / 100 for part, side in zip(found, (width, height, width, height)))
        if kind == "ellipse":
            return [ellipse((x, y), (a, b), found[4])]
        return [turned_rectangle((x, y, x + a, y + b), found[4], (x, y))]


def _labels(value: dict[str, Any]) -> list[str]:
    found = [value[key] for key in value if key.endswith("labels")]
    return [str(label) for labels in found for label in (labels if isinstance(labels, list) else [labels])]


def _said(values: list[dict[str, Any]]) -> list[str]:
    """What choices and texts without a region say."""
    found = [part for value in values for part in value.values()]
    return [str(one)[:80] for part in found for one in (part if isinstance(part, list) else [part])]
