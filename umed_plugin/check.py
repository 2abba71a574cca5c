"""Does a recipe fit the files on disk, and what is in them: ``umed recipe check R --data-root FOLDER``."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Optional, Union

from umed_plugin.annotations import AnnotationSet, read_annotations
from umed_plugin.boxes import best_iou_for_decimals
from umed_plugin.build import LEAST_VISIBLE, Prepared, prepare
from umed_plugin.errors import UmedError
from umed_plugin.geometry import ImageGeometry
from umed_plugin.recipe import Recipe
from umed_plugin.recipe_options import SPLITS

if TYPE_CHECKING:
    from rich.console import Console

DECIMALS = (2, 3)
_SHOWN = 10


@dataclass
class ClassCheck:
    """Lesions of one class.

    Attributes:
        per_split: split -> number of lesions.
        sides: width and height of every box, in pixels of its image.
        lost, cut: how many LLaVA's centre crop (mode ``square``) cuts off or trims.
        best_iou: number of decimals -> the best IoU that they allow, one per box (mode ``pad``).
    """

    per_split: Counter[str] = field(default_factory=Counter)
    sides: list[tuple[float, float]] = field(default_factory=list)
    lost: int = 0
    cut: int = 0
    best_iou: dict[int, list[float]] = field(default_factory=lambda: {decimals: [] for decimals in DECIMALS})


@dataclass
class RecipeCheck:
    """What `check_recipe` found.

    Attributes:
        images, negatives: split -> number of images, and of those without a lesion.
        patients: split -> patients; ``shared_patients`` are in more than one.
        classes: plain name -> its lesions.
        bad_images: what is missing on disk (first) or cannot be read.
    """

    recipe: Recipe
    annotations: AnnotationSet
    images: Counter[str] = field(default_factory=Counter)
    negatives: Counter[str] = field(default_factory=Counter)
    patients: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    classes: dict[str, ClassCheck] = field(default_factory=dict)
    bad_images: list[UmedError] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Everything that would stop a build, apart from missing images."""
        return self.annotations.faults.messages + [str(error) for error in self.bad_images]

    @property
    def ok(self) -> bool:
        """True when a build would go through."""
        return not self.faults and not self.annotations.missing

    @property
    def shared_patients(self) -> list[str]:
        """Patients in more than one split: what is measured on test would be known from training."""
        counts = Counter(patient for patients in self.patients.values() for patient in patients)
        return sorted(patient for patient, count in counts.items() if count > 1)


def check_recipe(
    recipe: Recipe, *, data_root: Optional[Union[str, Path]] = None, progress: bool = False
) -> RecipeCheck:
    """Read all annotations and images of a recipe and count.

    Raises:
        UmedError: there is no data folder.
    """
    check = RecipeCheck(recipe, read_annotations(recipe, data_root))
    check.classes = {name: ClassCheck() for name in recipe.names}
    for prepared in prepare(
        check.annotations.items, check.annotations, check.bad_images, recipe.name if progress else None
    ):
        _count(prepared, check)
    return check


def _count(prepared: Prepared, check: RecipeCheck) -> None:
    split = prepared.item.split
    check.images[split] += 1
    check.negatives[split] += not prepared.boxes
    check.patients[split].add(prepared.item.patient)
    padded, cropped = (ImageGeometry(*prepared.size, mode) for mode in ("pad", "square"))
    for box, name in zip(prepared.boxes, prepared.classes):
        found = check.classes[name]
        found.per_split[split] += 1
        found.sides.append((box[2] - box[0], box[3] - box[1]))
        share = cropped.visible_fraction(box)
        found.lost += share < LEAST_VISIBLE
        found.cut += LEAST_VISIBLE <= share < 1
        for decimals, values in found.best_iou.items():
            values.append(best_iou_for_decimals(padded.to_square([box])[0], decimals))


def print_check(check: RecipeCheck, console: Console) -> None:
    """Print the check as tables, faults last so that they are on the screen at the end."""
    from rich.markup import escape

    recipe = check.recipe
    console.print(f"[bold]{recipe.name}[/bold]: {escape(recipe.description)}", highlight=False)
    console.print(f"Terms: {escape(recipe.terms.licence)}. {escape(recipe.terms.url)}", highlight=False)
    console.print(f"Data:  {escape(str(check.annotations.root))}", highlight=False, soft_wrap=True)
    console.print(_splits_table(check))
    console.print(_classes_table(check))
    for reason, count in check.annotations.left_out.items():
        console.print(f"{count} images left out: {reason}")
    if check.annotations.dropped_boxes:
        console.print(f"{check.annotations.dropped_boxes} degenerate boxes left out")
    shared = check.shared_patients
    if shared:
        console.print(
            f"[yellow]{len(shared)} patients are in more than one split[/yellow] "
            f"({escape(', '.join(shared[:_SHOWN]))}): results on test will look better than they are."
        )
    missing = check.annotations.missing
    if missing:
        total = len(missing) + len(check.annotations.items)
        console.print(
            f"[red]{len(missing)} of {total} images are missing on disk.[/red] Get them from "
            f"{escape(recipe.terms.url)}. The first:",
            soft_wrap=True,
        )
        for item in missing[:_SHOWN]:
            console.print(f"  {escape(str(item.image))}", highlight=False, soft_wrap=True)
    if check.faults:
        console.print(f"[red]{len(check.faults)} faults:[/red]")
        for fault in check.faults[:_SHOWN]:
            console.print(f"  {escape(fault)}", highlight=False, soft_wrap=True)
        if len(check.faults) > _SHOWN:
            console.print(f"  ... and {len(check.faults) - _SHOWN} more")
    if check.ok:
        console.print("[green]The recipe fits the data.[/green]")


def _splits_table(check: RecipeCheck) -> object:
    from rich.table import Table

    table = Table(title="Images")
    for title in ("split", "images", "without lesion", "patients", "lesions"):
        table.add_column(title, justify="left" if title == "split" else "right")
    for split in [*SPLITS, *sorted(set(check.images) - set(SPLITS))]:
        lesions = sum(found.per_split[split] for found in check.classes.values())
        numbers = (check.images[split], check.negatives[split], len(check.patients.get(split, ())), lesions)
        table.add_row(split or "(none)", *map(str, numbers))
    return table


def _classes_table(check: RecipeCheck) -> object:
    from rich.table import Table

    table = Table(
        title="Lesions", caption="cut: by LLaVA's centre crop (square). IoU: best that the decimals allow (pad)."
    )
    titles = ["class", *SPLITS, "median box px", "lost / cut", *(f"IoU {d} decimals" for d in DECIMALS)]
    for title in titles:
        table.add_column(title, justify="left" if title == "class" else "right")
    for name, found in check.classes.items():
        row = [name, *(str(found.per_split[split]) for split in SPLITS)]
        if found.sides:
            row.append(f"{median(w for w, _ in found.sides):.0f} x {median(h for _, h in found.sides):.0f}")
            row.append(f"{found.lost} / {found.cut}")
            row += [f"{mean(values):.2f} (worst {min(values):.2f})" for values in found.best_iou.values()]
        table.add_row(*row)
    return table
