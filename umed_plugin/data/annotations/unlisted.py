"""Image files beside those that the annotations name: normal images without an entry are lost, and negatives with them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import without_ending
from umed_plugin.data.endings import IMAGE_ENDINGS
from umed_plugin.data.own_files import OwnFiles
from umed_plugin.faults import Faults

_BEHIND_A_STEM = "_-. ("


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
    unlisted, total = [], 0
    for folder, names in sorted(beside.items()):
        there = _image_files(folder)
        stems = {without_ending(name) for name in names}
        total += len(there)
        unlisted += [folder / name for name in there if name not in names and not _belongs_to_one(name, stems)]
    if unlisted:
        faults.remark(
            unlisted[0].parent,
            f"{len(unlisted)} of {total} image files are named by no entry that is read. The first: {unlisted[0].name}. If they "
            "are normal images, give them an entry without a box, or negatives.listed",
        )


def _image_files(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted, without those that umed has written itself."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMAGE_ENDINGS) and not entry.name.startswith(".") and entry.is_file()
        )
    return [path.name for path in OwnFiles(folder).without(folder / name for name in names)]


def _belongs_to_one(name: str, stems: set[str]) -> bool:
    """Whether a file is named after a named image, as ``a_mask.png`` is after ``a.png``."""
    return any(name[:at] in stems for at, sign in enumerate(name) if sign in _BEHIND_A_STEM)
