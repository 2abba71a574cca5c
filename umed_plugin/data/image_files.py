"""The image files that training items name: whether they are there, and whether LLaVA's reader shows what they hold.

Checked before a model is loaded, so that a run does not stop at step 900. Of very many files an even sample is looked for, and of
a smaller one the headers are read. No pixels are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, TypeVar
from urllib.parse import unquote

from umed_plugin.data.images import check_picture, slice_count
from umed_plugin.errors import UmedError, warn

MOST_LOOKED_FOR, MOST_OPENED = 20_000, 200
_NAMED = 3
_LONGEST = 200
_T = TypeVar("_T")


def check_image_files(
    items: Sequence[dict[str, Any]], folder: str, where: str, *, skip: bool, opened_by_llava: bool
) -> None:
    """Look for the images of items before training.

    Args:
        items: checked ones (`umed_plugin.data.items`).
        folder: ``--image_folder``, before relative paths.
        where: the items' file, for messages.
        skip: whether the run leaves unreadable images out; then they are only counted.
        opened_by_llava: whether LLaVA's own reader opens them, which clips more than 8 bits.

    Raises:
        UmedError: images are missing, unreadable, or clipped, and are not to be skipped. Or all of them are missing.
    """
    owners: dict[str, Any] = {}
    for index, item in enumerate(items):
        if "image" in item:
            owners.setdefault(item["image"], item.get("id", f"[{index}]"))
    names = list(owners)
    looked_for = evenly(names, MOST_LOOKED_FOR)
    missing = [name for name in looked_for if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        first = f"record {owners[missing[0]]}: cannot read the image {_short(os.path.join(folder, missing[0]))}"
        counted = f"{len(missing)} of {len(looked_for)} {_of(looked_for, names)}image files are not there"
        if len(missing) == len(looked_for):
            counted = f"none of the {len(looked_for)} images can be read, because the files are not there"
        elif skip:
            first = _some(missing)
        _refuse_or_warn(
            f"{where}: {counted}: {first}.{_hint(missing[0], folder)}", skip and len(missing) < len(looked_for)
        )
    absent = set(missing)
    present = [name for name in evenly(looked_for, MOST_OPENED) if name not in absent]
    if opened_by_llava:
        _check_opened(present, owners, folder, where, skip)


def check_images_to_encode(
    items: Sequence[dict[str, Any]], cached: Callable[[int], bool], folder: str, where: str, *, skip: bool
) -> None:
    """Read the headers of the images that a feature cache does not hold. The others are not opened.

    Args:
        items: as for `check_image_files`, which has looked for their files.
        cached: whether the features of the image of item ``index`` are there.
        folder: ``--image_folder``, before relative paths.
        where: the items' file, for messages.
        skip: whether the run leaves unreadable images out; then they are only counted.

    Raises:
        UmedError: images are unreadable or clipped, and are not to be skipped. Or none can be read, and none is cached.
    """
    owners: dict[str, Any] = {}
    some_cached = False
    for index in evenly(range(len(items)), MOST_LOOKED_FOR):
        item = items[index]
        if "image" not in item or not os.path.isfile(os.path.join(folder, item["image"])):
            continue
        if cached(index):
            some_cached = True
        else:
            owners.setdefault(item["image"], item.get("id", f"[{index}]"))
    _check_opened(evenly(list(owners), MOST_OPENED), owners, folder, where, skip, others=some_cached)


def _check_opened(
    names: Sequence[str], owners: Mapping[str, Any], folder: str, where: str, skip: bool, *, others: bool = False
) -> None:
    """Read headers; ``others`` says whether there are images beside these that can be trained on."""
    faults, pages = [], []
    looked_at = _of(names, owners)
    for name in names:
        path = Path(folder) / name
        try:
            check_picture(path)
            if slice_count(path) > 1:
                pages.append(name)
        except UmedError as error:
            faults.append((f"record {owners[name]}: cannot read the image {path} ({error})", str(error)))
    if faults:
        only_some = skip and (others or len(faults) < len(names))
        shown = faults[0][1] if only_some else faults[0][0]
        text = f"{where}: {len(faults)} of {len(names)} {looked_at}images cannot be trained on. {shown}"
        _refuse_or_warn(text, only_some)
    if pages:
        warn(
            f"{where}: {len(pages)} of {len(names)} {looked_at}images have several pages, such as {_some(pages)}. LLaVA reads "
            "the first page alone. A recipe with `slice` names another."
        )


def _refuse_or_warn(text: str, skip: bool) -> None:
    if not skip:
        raise UmedError(
            f"{text} Repair the files, remove the records, or train on the others: --umed_on_bad_image skip."
        )
    warn(f"{text} They are skipped when their turn comes: the next record takes the place.")


def evenly(all_of_them: Sequence[_T], most: int) -> list[_T]:
    """At most so many, spread over the whole sequence, in its order.

    Example:
        >>> evenly(range(10), 4)
        [0, 2, 5, 7]
    """
    count = min(len(all_of_them), most)
    return [all_of_them[i * len(all_of_them) // count] for i in range(count)]


def _of(some: Sequence[str], names: Collection[str]) -> str:
    return "" if len(some) == len(names) else f"looked at (of {len(names)}) "


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(_short(name)) for name in names[:_NAMED])
    return shown + (", ..." if len(names) > _NAMED else "")


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[:_LONGEST] + "..."


def _hint(name: str, folder: str) -> str:
    """What the name of a missing file probably is."""
    if name.startswith("data:"):
        return " That is an image's content, not a file: write it to a file."
    if "://" in name:
        return " LLaVA reads files, not addresses: download them first."
    other: Optional[str] = next(
        (
            meant
            for meant in (
                name.strip(),
                name.replace("\\", "/"),
                unquote(name),
                name.lstrip("/"),
                os.path.basename(name),
            )
            if meant and meant != name and os.path.isfile(os.path.join(folder, meant))
        ),
        None,
    )
    return (
        f" There is {other!r} in {folder}." if other else f" Relative names are looked for in --image_folder {folder}."
    )
