"""Report of a recipe's check: its tables, and how the terminal shows them.

The page is `umed_plugin.commands.recipe.check_page`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import TYPE_CHECKING

from umed_plugin.data.annotations.finding import did_you_mean_file
from umed_plugin.data.checking.check import DECIMALS, ClassCheck, RecipeCheck
from umed_plugin.data.checking.plausibility import LOOKED_AT, plausibility, suggestions
from umed_plugin.data.leaks import SAME
from umed_plugin.data.recipes.recipe import Mixture, sources_of
from umed_plugin.data.splits import SPLITS
from umed_plugin.terminal.text import one_line

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 10
_EXAMPLES = 3  # of a row of the plausibility table


def print_check(check: RecipeCheck, console: Console) -> None:
    """Print the check as tables. Faults come last, so that they are on the screen at the end."""
    from rich.text import Text

    recipe = check.recipe
    console.print(Text.assemble((recipe.name, "bold"), f": {recipe.description}"))
    for source in sources_of(recipe):
        whose = f" of {source.name}" if isinstance(recipe, Mixture) else ""
        console.print(f"Terms{whose}: {source.terms.licence}. {source.terms.url}")
    console.print(f"Data:  {one_line(check.annotations.root)}", soft_wrap=True)
    if isinstance(recipe, Mixture):
        console.print(sources_table(check).for_terminal())
        if sum(check.images.values()) < recipe.size:
            available = (
                f"{sum(check.images.values()):,} of the {recipe.size:,} images that the mixture asks for are there."
            )
            console.print(available, style="yellow")
    console.print(splits_table(check).for_terminal())
    console.print(classes_table(check).for_terminal())
    for line in check.annotations.unused_options + check.annotations.faults.remarks:
        console.print(one_line(line), style="yellow", soft_wrap=True)
    _print_leaks(check, console)
    _print_plausibility(check, console)
    _print_missing(check, console)
    for line in suggestions(check):
        console.print(f"Suggestion: {one_line(line)}", soft_wrap=True)
    if check.faults:
        console.print(f"{len(check.faults)} fault{'s' if len(check.faults) > 1 else ''}:", style="red")
        for fault in check.faults[:_SHOWN]:
            console.print(f"  {fault}", soft_wrap=True)
        if len(check.faults) > _SHOWN:
            console.print(f"  ... and {len(check.faults) - _SHOWN} more")
    if check.ok:
        console.print("The recipe fits the data.", style="green")


def _print_plausibility(check: RecipeCheck, console: Console) -> None:
    from rich.table import Table

    rows = plausibility(check)
    if rows:
        table = Table(title="Plausibility", caption="Look at these. They do not stop a build.")
        for title in ("what", "count", "of", "first"):
            table.add_column(title, justify="right" if title in ("count", "of") else "left", overflow="fold")
        for row in rows:
            shown = ", ".join(one_line(example) for example in row.examples[:_EXAMPLES])
            table.add_row(one_line(row.what), f"{row.count}", "" if row.of is None else f"{row.of}", shown)
        console.print(table)
    console.print(f"Looked at: {', '.join(LOOKED_AT)}.", soft_wrap=True)


def _print_leaks(check: RecipeCheck, console: Console) -> None:
    from rich.text import Text

    by_kind = {"in two splits": check.split_leaks, "in an evaluation set too": check.evaluation_leaks}
    for where, leaks in by_kind.items():
        if leaks is None:
            continue
        if not leaks:
            console.print(f"No picture is {where}.")
            continue
        found = (f"{len(leaks)} pictures are {where}", "yellow")
        console.print(Text.assemble(found, f" (similarity of at least {SAME}). The first:"))
        for leak in sorted(leaks, key=lambda leak: -leak.likeness)[:_SHOWN]:
            line = f"  {leak.likeness:.3f}  {one_line(leak.name)}  =  {one_line(leak.other)}"
            console.print(line, soft_wrap=True)


def _print_missing(check: RecipeCheck, console: Console) -> None:
    from rich.text import Text

    for source in sources_of(check.recipe):
        missing = [item for item in check.annotations.missing if item.recipe.name == source.name]
        if not missing:
            continue
        total = len(missing) + sum(item.recipe.name == source.name for item in check.annotations.items)
        whose = f" of {source.name}" if isinstance(check.recipe, Mixture) else ""
        console.print(
            Text.assemble(
                (f"{len(missing)} of {total} images{whose} are missing on disk.", "red"),
                f" Get them from {source.terms.url}. The first:",
            ),
            soft_wrap=True,
        )
        for item in missing[:_SHOWN]:
            picture = item.not_on_disk() or item.image
            meant = did_you_mean_file(picture, item.root)
            console.print(f"  {one_line(picture)}{one_line(meant)}", soft_wrap=True)


@dataclass(frozen=True)
class CheckTable:
    """A table of the check, for the terminal and the page: the first column names a row, the others are numbers."""

    title: str
    about: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def for_terminal(self) -> object:
        """The table as rich prints it."""
        from rich.table import Table

        table = Table(title=self.title, caption=self.about or None)
        for place, head in enumerate(self.heads):
            table.add_column(head, justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def sources_table(check: RecipeCheck) -> CheckTable:
    """One row for each data set of a mixture."""
    heads = ("source", "images", "no lesion", "missing", "patients", "lesions", *_BOX_TITLES)
    rows = []
    for name, counts in check.sources.items():
        numbers = (counts.images, counts.negatives, counts.missing, len(counts.patients), len(counts.sides))
        rows.append([name, *map(str, numbers), *_about_boxes(counts)])
    return CheckTable("Sources", f"missing: annotated, but not on disk. {_ABOUT_BOXES}", heads, rows)


def splits_table(check: RecipeCheck) -> CheckTable:
    """One row for each split."""
    rows = []
    labelled = bool(+check.labelled)
    for split in [*SPLITS, *sorted(set(check.images) - set(SPLITS))]:
        lesions = sum(counts.per_split[split] for counts in check.classes.values())
        numbers = [check.images[split], check.negatives[split], len(check.patients.get(split, ())), lesions]
        rows.append([split or "(none)", *map(str, [*numbers, check.labelled[split]] if labelled else numbers)])
    heads = ["split", "images", "without lesion", "patients", "lesions"]
    alone = sum(check.images.values()) == len(check.patient_images)
    about = ["The recipe knows no patients, so each image counts as one."] if alone and rows else []
    about += ["label, no box: pseudo_boxes find a box for these, with umed recipe build --tower."] if labelled else []
    return CheckTable("Images", " ".join(about), [*heads, "label, no box"] if labelled else heads, rows)


def classes_table(check: RecipeCheck) -> CheckTable:
    """One row for each class."""
    rows = [
        [name, *(str(counts.per_split[split]) for split in SPLITS), *_about_boxes(counts)]
        for name, counts in check.classes.items()
    ]
    return CheckTable("Lesions", _ABOUT_BOXES, ("class", *SPLITS, *_BOX_TITLES), rows)


_BOX_TITLES = ("median px", "lost / cut", *(f"IoU {decimals} dec." for decimals in DECIMALS))
_ABOUT_BOXES = (
    "lost / cut: boxes wholly / partly outside of LLaVA's centre crop (square). IoU: the best that the decimals allow (pad), "
    "mean / worst."
)


def _about_boxes(counts: ClassCheck) -> list[str]:
    if not counts.sides:
        return []
    width, height = (median(sides) for sides in zip(*counts.sides))
    ious = [f"{mean(values):.2f} / {min(values):.2f}" for values in counts.best_iou.values()]
    return [f"{width:.0f} x {height:.0f}", f"{counts.lost} / {counts.cut}", *ious]
