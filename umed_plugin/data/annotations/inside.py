"""Images must lie in the data root: annotation files come from strangers, and must not choose which other files are read or sent.

Allowed are the data root, the folders outside of it that the recipe itself names, ``linked_roots`` of the recipe, and the folders
in the environment variable ``UMED_LINKED_ROOTS``. Links are followed, so a link to another disk needs one of the last two.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import matching_folders, real_path
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults

VARIABLE = "UMED_LINKED_ROOTS"
_SHOWN = 5
_LONGEST_NAME = 255  # in bytes, on all common file systems


def with_possible_paths(items: Sequence[Annotated], faults: Faults) -> list[Annotated]:
    """The items whose image can be the path of a file; a fault for each other one, such as a name with a NUL."""
    kept = []
    for item in items:
        try:
            parts = [os.fsencode(part) for part in item.image.parts]
        except UnicodeEncodeError:
            parts = [b"\0"]
        if any(b"\0" in part or len(part) > _LONGEST_NAME for part in parts):
            faults.add(item.where, f"the image {str(item.image)[-200:]!r} cannot be the path of a file")
        else:
            kept.append(item)
    return kept


def check_inside(items: Sequence[Annotated], recipe: Recipe, root: Path, faults: Faults) -> None:
    """Add a fault for each image outside of the allowed folders (the first five, then how many more)."""
    allowed = [f"{os.path.realpath(folder)}{os.sep}" for folder in (root, *_declared(recipe, root), *_linked(recipe))]
    allowed = [folder.replace(2 * os.sep, os.sep) for folder in allowed]
    real_folders: dict[str, str] = {}
    outside: dict[str, tuple[Annotated, str]] = {}
    for item in items:
        for path in [file for picture in (item.image, *item.views) for file in _files_of(picture)]:
            real = real_path(path, real_folders)
            if not any(f"{real}{os.sep}".startswith(folder) for folder in allowed):
                outside.setdefault(str(item.image), (item, real))
    for item, real in list(outside.values())[:_SHOWN]:
        written = os.path.normpath(item.image)
        leads = f" leads to {real}, which" if real != written else ""
        faults.add(
            item.where,
            f"image {written}{leads} is not in the data root {root}. If this is meant, name its folder in linked_roots of the "
            f"recipe, or in the environment variable {VARIABLE}",
        )
    if len(outside) > _SHOWN:
        faults.add(root, f"{len(outside) - _SHOWN} more images are not in the data root")


def _declared(recipe: Recipe, root: Path) -> list[Path]:
    """Folders that the recipe names by a path that leaves the data root: where images are, or annotations beside them."""
    options = recipe.annotations
    named = [folder for split in ("", "train", "val", "test") for folder in options.image_roots(split)]
    named += [os.path.dirname(name) for name in options.files.values()]
    outside = [folder for folder in named if os.path.relpath(root / folder, root).startswith(os.pardir)]
    return [match for folder in outside for match in matching_folders(root, folder)]


def _linked(recipe: Recipe) -> list[Path]:
    given = [*recipe.linked_roots, *os.environ.get(VARIABLE, "").split(os.pathsep)]
    return [Path(os.path.expandvars(folder)).expanduser() for folder in given if folder]


def _files_of(image: Path) -> list[str]:
    """The path, and for the folder of a series those of its files that are links."""
    if not image.is_dir():
        return [str(image)]
    return [str(image), *(entry.path for entry in os.scandir(image) if entry.is_symlink())]
