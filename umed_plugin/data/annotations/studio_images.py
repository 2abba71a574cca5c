"""Which image a task of Label Studio, and each of its regions, is about. A task may show several images side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.parse import parse_qs, unquote, urlsplit

from umed_plugin.data.endings import RASTER_ENDINGS
from umed_plugin.faults import Faults

# What Label Studio puts before the name of an uploaded file.
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
# One region of an annotation: its shape, its label, and texts about it.
Group = list[dict[str, Any]]


class ImageTags:
    """The regions of one file by the image that they are drawn on: ``to_name``, an image tag of the labelling interface."""

    def __init__(self, wanted: Optional[str], path: Path, faults: Faults) -> None:
        self._wanted, self._path, self._faults = wanted, path, faults
        self._met: dict[str, str] = {}
        self._drawn: dict[str, None] = {}
        self._side_by_side = self._told = False

    def on_image(self, groups: Sequence[Group], data: Mapping[str, Any], where: str) -> Optional[list[Group]]:
        """The groups without those of other images, which are counted; None after a fault.

        Args:
            groups: of one annotation, or of one entry of JSON-MIN.
            data: the task's fields, of which several may name an image.
        """
        names = [_name_of(group) for group in groups]
        found = list(dict.fromkeys(filter(None, names)))
        for name in found:
            self._met.setdefault(name, where)
        self._side_by_side = self._side_by_side or len(images_of(data)) > 1
        if self._wanted is None:
            if len(found) < 2:
                return list(groups)
            self._told = True
            self._faults.add(
                where,
                f"has regions of {len(found)} images ({', '.join(found)}); say which one by annotations.to_name, and its file "
                "by annotations.image",
            )
            return None
        if "" in names:
            self._faults.add(where, "has a region without to_name, so annotations.to_name cannot tell whose it is")
            return None
        kept: list[Group] = []
        for group, drawn_on in zip(groups, names):
            if (drawn_on or _said_of(group)) in ("", self._wanted):
                kept.append(group)
            else:
                kind = "choices or texts" if drawn_on is None else "regions"
                self._faults.left_out[kind, "of another image of their task; annotations.to_name"] += 1
        return kept

    def one_of_min(self, tags: Sequence[str], data: Mapping[str, Any], where: str) -> bool:
        """False after a fault: JSON-MIN names no ``to_name``, so regions of several images cannot be told apart.

        Args:
            tags: control tags of the entry that hold regions.
            data: the entry's other fields.
        """
        images = images_of(data)
        self._drawn.update(dict.fromkeys(tags))
        if tags and self._wanted is not None:
            self._faults.add(where, "is of JSON-MIN, which has no to_name (annotations.to_name). Export it as JSON")
        elif tags and len(self._drawn) > 1 and len(images) > 1:
            self._faults.add(
                where,
                f"has images in {', '.join(images)}, and regions are in {', '.join(self._drawn)}. JSON-MIN does not say whose. "
                "Export it as JSON, and name one image by annotations.to_name",
            )
        else:
            return True
        return False

    def tell(self) -> None:
        """Add a fault for a name that no region has, and for images that only different tasks tell apart."""
        met = ", ".join(sorted(self._met))
        if self._wanted is not None and self._met and self._wanted not in self._met:
            self._faults.add(
                self._path, f"has no region of {self._wanted!r} (annotations.to_name). Regions are of {met}"
            )
        elif self._wanted is None and self._side_by_side and not self._told and len(self._met) > 1:
            self._faults.add(
                self._path,
                f"has regions of {len(self._met)} images ({met}), as in {' and '.join(list(self._met.values())[:2])}; say "
                "which one by annotations.to_name, and its file by annotations.image",
            )


def _name_of(group: Group) -> Optional[str]:
    """The image tag that a region is drawn on, empty if none is named; None if the group is no region."""
    drawn = [
        one for one in group if isinstance(one.get("value"), dict) and (region_kind(one["value"]) or unread_type(one))
    ]
    return str(drawn[0].get("to_name") or "") if drawn else None


def _said_of(group: Group) -> str:
    """The tag that a choice or text is about, empty if none is named, as of a relation."""
    return next((str(one["to_name"]) for one in group if one.get("to_name")), "")


def region_kind(value: Mapping[str, Any]) -> str:
    """Kind of a region by its fields; empty for a choice, a text or a relation."""
    for key, kind in (("rle", "brush"), ("points", "polygon"), ("vertices", "vector"), ("radiusX", "ellipse")):
        if key in value:
            return kind
    if "x" not in value:
        return ""
    return "rectangle" if "height" in value else "keypoint"


def unread_type(result: Mapping[str, Any]) -> str:
    """Type of a region whose shape is not known here, such as a bitmask; empty for any other result.

    Args:
        result: as in the export JSON, or a region of JSON-MIN under ``value``, which has no type.
    """
    value = result.get("value")
    if not isinstance(value, Mapping) or region_kind(value) or "choices" in value or "start" in value:
        return ""  # what has a start is a part of a text, a sound or a series
    names = [str(key) for key in value if str(key).endswith("labels")]
    kind = str(result.get("type") or (names[0] if names else "region"))
    is_drawn = "original_width" in result and ("type" not in result or kind.endswith("labels"))
    return kind if names or is_drawn or "imageDataURL" in value else ""


def images_of(data: Mapping[str, Any]) -> list[str]:
    """The fields that look as if they name an image, by its ending."""
    return [
        str(key)
        for key, value in data.items()
        if isinstance(value, str) and image_names(value)[-1].lower().endswith(RASTER_ENDINGS)
    ]


def image_names(written: str) -> list[str]:
    """Names under which the image of a task is looked for, the longest first.

    Example:
        >>> from umed_plugin.data.annotations.studio_images import image_names
        >>> image_names("/data/upload/3/0a1b2c3d-ct%201.png")
        ['data/upload/3/0a1b2c3d-ct 1.png', '0a1b2c3d-ct 1.png', 'ct 1.png']
        >>> image_names("/data/local-files/?d=set/a.png")
        ['set/a.png', 'a.png']
    """
    written_path = written.replace("\\", "/")
    try:
        parts = urlsplit(written_path)
    except ValueError:  # such as "http://[", which is no URL
        return [written_path.rsplit("/", 1)[-1] or written]
    path = unquote(parts.path)
    if parts.path.rstrip("/").endswith("local-files"):
        path = parse_qs(parts.query).get("d", [path])[0]
    last = path.rsplit("/", 1)[-1]
    return list(dict.fromkeys([path.lstrip("/") or written, last or written, _UPLOADED.sub("", last) or written]))
