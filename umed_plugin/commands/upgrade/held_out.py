"""Which held-out studies the trial of ``rewarding: auto`` is judged by.

They are those of the split val of the records that are trained on, also where ``evaluation.recipe`` names others for the test.
The guard against studies that are known by heart compares with the same. Boxes that no person drew measure nothing. Where the
records have such boxes, the split val of ``evaluation.recipe`` judges.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umed_plugin.commands.upgrade.settings import Settings
from umed_plugin.data.json_list import items_of
from umed_plugin.data.prepared import has_pseudo_boxes
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.record_file import kept_splits
from umed_plugin.data.records import are_pseudo
from umed_plugin.errors import UmedError
from umed_plugin.files import file_stamp

_ALWAYS = "or set rewarding.run to always"


class HeldOut:
    """The held-out studies of a run.

    Args:
        settings: filled in.
        records: that are trained on; they may not be built yet.
    """

    def __init__(self, settings: Settings, records: Path) -> None:
        self._settings, self._records = settings, records

    def has_val(self) -> bool:
        """Whether the records have a split val; False while they are not built."""
        return self._records.is_file() and _has_val(self._records, file_stamp(self._records))

    def has_val_if_built(self) -> bool | None:
        """Whether the records have a split val; None while they are not built."""
        return self.has_val() if self._records.is_file() else None

    def recipe(self) -> str | None:
        """``evaluation.recipe``, if it has to judge the trial; None: the records that are trained on do."""
        return self._settings.evaluation.recipe if self._boxes_are_pseudo() else None

    def check(self) -> None:
        """Refuse a trial that nothing could judge.

        Raises:
            UmedError: a split val is missing, or nobody drew its boxes.
        """
        asks = "rewarding: auto decides by the studies of the split val"
        if self._records.is_file() and not self.has_val():
            raise UmedError(f"{asks}, and {self._records} has none. Give the recipe a val split, {_ALWAYS}.")
        if not self._boxes_are_pseudo():
            return
        asks += f", and no person drew the boxes of {self._settings.recipe} (pseudo-boxes). So evaluation.recipe judges"
        judge = self._settings.evaluation
        if judge.recipe is None:
            raise UmedError(
                f"{asks}, and it is not set. Set it to a recipe with true boxes and a val split, {_ALWAYS}."
            )
        if not self._other_can_judge:
            raise UmedError(f"{asks}, and {judge.recipe} has no split val with true boxes. Give it one, {_ALWAYS}.")

    @functools.cached_property
    def _other_can_judge(self) -> bool:
        judge = self._settings.evaluation
        return judge.recipe is not None and _can_judge(judge.recipe, judge.data_root)

    def _boxes_are_pseudo(self) -> bool:
        if not self._settings.recipe.endswith(".json"):
            return has_pseudo_boxes(load_recipe(self._settings.recipe))
        return self._records.is_file() and _has_pseudo_val(self._records, file_stamp(self._records))


def _can_judge(recipe: str, data_root: str | None) -> bool:
    """Whether a recipe, or a JSON of records, has a split val with true boxes. True where the data cannot be read.

    The evaluation of the input reads them too, before stage 1, and says what is wrong with them.
    """
    if not recipe.endswith(".json"):
        return _recipe_has_val(recipe, data_root)
    file = Path(recipe)
    return not file.is_file() or (_has_val(file, file_stamp(file)) and not _has_pseudo_val(file, file_stamp(file)))


def _recipe_has_val(recipe: str, data_root: str | None) -> bool:
    from umed_plugin.data.annotations import read_annotations

    with contextlib.suppress(UmedError):
        items = read_annotations(load_recipe(recipe), data_root).items
        # None at all: the folder is there, and the disk below it is not.
        return not items or any(item.split == "val" for item in items)
    return True


@functools.cache
def _has_val(file: Path, _stamp: tuple[int, int]) -> bool:
    splits = kept_splits(file)
    # Where no training has kept an index of the records yet, they are read.
    return any(_val_items(file)) if splits is None else "val" in splits


@functools.cache
def _has_pseudo_val(file: Path, _stamp: tuple[int, int]) -> bool:
    return any(map(are_pseudo, _val_items(file)))


def _val_items(records: Path) -> Iterator[dict[str, Any]]:
    """The records of the split val."""
    with contextlib.suppress(ValueError, RecursionError):  # the steps that read them say what is wrong
        for placed in items_of(records, strict=True):
            if isinstance(placed.item, dict) and placed.item.get("split") == "val":
                yield placed.item
