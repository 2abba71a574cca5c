"""Report of a recipe's check: tables for the terminal, and a page with a contact sheet per source.

``umed recipe check R --report FOLDER`` writes ``FOLDER/check.html`` and the sheets beside it. Look at the sheets: no table shows
whether boxes are on lesions.
"""

from __future__ import annotations

import html
import io
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

from umed_plugin import files
from umed_plugin.data.annotations.finding import did_you_mean_file
from umed_plugin.data.checking.check import DECIMALS, ClassCheck, RecipeCheck
from umed_plugin.data.checking.plausibility import LOOKED_AT, plausibility
from umed_plugin.data.leaks import SAME
from umed_plugin.data.recipes.options import SPLITS
from umed_plugin.data.recipes.recipe import AnyRecipe, Mixture, Recipe
from umed_plugin.terminal.console import console as make_console
from umed_plugin.terminal.text import one_line

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 10
_EXAMPLES = 3  # of a row of the plausibility table
_WIDTH = 150  # of the page's tables, in characters


def sources_of(recipe: AnyRecipe) -> list[Recipe]:
    """The recipes of a mixture, or the recipe alone."""
    return list(recipe.recipes.values()) if isinstance(recipe, Mixture) else [recipe]


def write_report(check: RecipeCheck, folder: Path) -> Path:
    """Write the tables, a contact sheet per source and one of augmented studies, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    console = make_console(record=True, file=io.StringIO(), width=_WIDTH)
    print_check(check, console)
    page = console.export_html(inline_styles=True)
    pictures = "".join(
        f'<h2>{html.escape(source)}</h2><img style="max-width:100%" src="{sheet.name}" alt="{html.escape(source)}: boxes">'
        for source, sheet in check.sheets.save(folder).items()
    )
    pictures += _augmented_pictures(check, folder)
    title = f"<title>{html.escape(check.recipe.name)}: check</title>"
    page = page.replace("<head>", f"<head>{title}").replace("</body>", f"{pictures}</body>")
    target = folder / "check.html"
    files.write_text(target, page)
    return target


def _augmented_pictures(check: RecipeCheck, folder: Path) -> str:
    """The sheets of augmented studies, each under a line that says by which rule."""
    written = check.augmented.save(folder) if check.augmented is not None else {}
    rules = {recipe.name: recipe.augment for recipe in sources_of(check.recipe)}
    pictures = ""
    for source, sheet in written.items():
        rule = rules.get(source)
        told = (
            "the defaults, since the recipe has no <code>augment</code>"
            if rule is None
            else html.escape(f"augment: {rule}")
        )
        name = html.escape(source)
        pictures += (
            f"<h2>{name}: augmented</h2><p>First as it is, then in the first four epochs in which "
            f"<code>--umed_augment True</code> changes it, by {told}.</p>"
            f'<img style="max-width:100%" src="{sheet.name}" alt="{name}: augmented studies">'
        )
    return pictures


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
        console.print(_sources_table(check))
        if sum(check.images.values()) < recipe.size:
            available = (
                f"{sum(check.images.values()):,} of the {recipe.size:,} images that the mixture asks for are there."
            )
            console.print(available, style="yellow")
    console.print(_splits_table(check))
    console.print(_classes_table(check))
    for line in check.annotations.unused_options + check.annotations.faults.remarks:
        console.print(one_line(line), style="yellow", soft_wrap=True)
    shared = check.shared_patients
    if shared:
        console.print(
            Text.assemble(
                (f"{len(shared)} patients are in more than one split", "yellow"),
                f" ({one_line(', '.join(shared[:_SHOWN]))}): results on test will look better than they are.",
            )
        )
    _print_leaks(check, console)
    _print_plausibility(check, console)
    _print_missing(check, console)
    if check.faults:
        console.print(f"{len(check.faults)} faults:", style="red")
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
            meant = did_you_mean_file(item.image, item.root)
            console.print(f"  {one_line(item.image)}{one_line(meant)}", soft_wrap=True)


def _sources_table(check: RecipeCheck) -> object:
    from rich.table import Table

    table = Table(title="Sources", caption=f"missing: annotated, but not on disk. {_ABOUT_BOXES}")
    titles = ("source", "images", "no lesion", "missing", "patients", "lesions", *_BOX_TITLES)
    for title in titles:
        table.add_column(title, justify="left" if title == "source" else "right", overflow="fold")
    for name, counts in check.sources.items():
        numbers = (counts.images, counts.negatives, counts.missing, len(counts.patients), len(counts.sides))
        table.add_row(name, *map(str, numbers), *_about_boxes(counts))
    return table


def _splits_table(check: RecipeCheck) -> object:
    from rich.table import Table

    table = Table(title="Images")
    for title in ("split", "images", "without lesion", "patients", "lesions"):
        table.add_column(title, justify="left" if title == "split" else "right")
    for split in [*SPLITS, *sorted(set(check.images) - set(SPLITS))]:
        lesions = sum(counts.per_split[split] for counts in check.classes.values())
        numbers = (check.images[split], check.negatives[split], len(check.patients.get(split, ())), lesions)
        table.add_row(split or "(none)", *map(str, numbers))
    return table


def _classes_table(check: RecipeCheck) -> object:
    from rich.table import Table

    table = Table(title="Lesions", caption=_ABOUT_BOXES)
    for title in ("class", *SPLITS, *_BOX_TITLES):
        table.add_column(title, justify="left" if title == "class" else "right", overflow="fold")
    for name, counts in check.classes.items():
        table.add_row(name, *(str(counts.per_split[split]) for split in SPLITS), *_about_boxes(counts))
    return table


_BOX_TITLES = ("median px", "lost / cut", *(f"IoU {decimals} dec." for decimals in DECIMALS))
_ABOUT_BOXES = "cut: by LLaVA's centre crop (square). IoU: the best that the decimals allow (pad), mean / worst."


def _about_boxes(counts: ClassCheck) -> list[str]:
    if not counts.sides:
        return []
    width, height = (median(sides) for sides in zip(*counts.sides))
    ious = [f"{mean(values):.2f} / {min(values):.2f}" for values in counts.best_iou.values()]
    return [f"{width:.0f} x {height:.0f}", f"{counts.lost} / {counts.cut}", *ious]
