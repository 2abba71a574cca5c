"""Image files beside those that the annotations name: normal images without an entry are lost, and negatives with them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.endings import IMAGE_ENDINGS
from umed_plugin.faults import Faults


def tell_unlisted(named: Iterable[Annotated], faults: Faults) -> None:
    """Remark on the image files that lie in a folder with a named image, and that no entry names.

    Args:
        named: all that the annotations name, also what the recipe leaves out. A series, which is a folder, has none beside it.
        faults: where there are some already, an entry may be unread because of them, and nothing is said.
    """
    if faults.messages:
        return
    beside: dict[Path, set[str]] = defaultdict(set)
    for item in named:
        for picture in (item.image, *item.views):
            beside[picture.parent].add(picture.name)
    count, total, first = 0, 0, None
    for folder, names in sorted(beside.items()):
        found = sorted(name for name in _image_files(folder) if name not in names)
        count, total = count + len(found), total + len(found) + len(names)
        first = first or (folder / found[0] if found else None)
    if first is not None:
        faults.remark(
            first.parent,
            f"{count} of {total} image files are named by no entry that is read. The first: {first.name}. A normal image needs "
            "an entry without a box, or negatives.listed",
        )


def _image_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMAGE_ENDINGS) and not entry.name.startswith(".") and entry.is_file()
        ]
