"""The page of ``umed recipe check R --report FOLDER``: tables, faults linked to their pictures, near-duplicates, and a gallery.

Look at the gallery: no table shows whether boxes are on lesions. Like `umed report`'s page, the file loads nothing.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.commands.page_parts import GALLERY_SCRIPTS, GALLERY_STYLES, render_page
from umed_plugin.data.checking.check import RecipeCheck
from umed_plugin.data.checking.plausibility import LOOKED_AT, plausibility, suggestions
from umed_plugin.data.checking.report import classes_table, sources_table, splits_table
from umed_plugin.data.leaks import SAME, Leak
from umed_plugin.data.recipes.recipe import Mixture, sources_of
from umed_plugin.errors import UmedError
from umed_plugin.terminal.text import one_line

FILE = "check.html"
_FAULTS, _PAIRS = 200, 60  # shown at most


def write_report(check: RecipeCheck, folder: Path) -> Path:
    """Write the page, and a contact sheet per source beside it; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(__file__).parent
    data = {"cards": check.images_shown.cards, "pairs": _pairs(check), "places": _places(check)}
    page = render_page(
        own / "check.html",
        styles=[*GALLERY_STYLES, own / "check.css"],
        scripts=[*GALLERY_SCRIPTS, own / "check.js"],
        data=data,
        recipe=check.recipe,
        root=one_line(check.annotations.root),
        sources=sources_of(check.recipe),
        ok=check.ok,
        faults=[_linked(check, fault) for fault in check.faults[:_FAULTS]],
        more_faults=max(0, len(check.faults) - _FAULTS),
        missing=[one_line(item.image) for item in check.annotations.missing[:_FAULTS]],
        missing_count=len(check.annotations.missing),
        remarks=[*check.annotations.unused_options, *check.annotations.faults.remarks],
        suggestions=suggestions(check),
        findings=plausibility(check),
        looked_at=LOOKED_AT,
        tables=[
            *([sources_table(check)] if isinstance(check.recipe, Mixture) else []),
            splits_table(check),
            classes_table(check),
        ],
        sheets={source: sheet.name for source, sheet in check.sheets.save(folder).items()},
        augmented=_augmented(check, folder),
        shown=len(check.images_shown.cards),
        images=sum(check.images.values()),
        pairs=len(data["pairs"]),
        same=SAME,
    )
    target = folder / FILE
    files.write_text(target, page)
    return target


def _augmented(check: RecipeCheck, folder: Path) -> list[dict[str, str]]:
    """The sheets of augmented studies, each with the rule that made it; the page holds the picture, and the folder the file."""
    written = check.augmented.save(folder) if check.augmented is not None else {}
    rules = {recipe.name: recipe.augment for recipe in sources_of(check.recipe)}
    sheets = []
    for source, sheet in written.items():
        rule = rules.get(source)
        told = "the defaults, since the recipe has no augment" if rule is None else f"augment: {rule}"
        picture = "data:image/png;base64," + base64.b64encode(sheet.read_bytes()).decode()
        sheets.append({"source": source, "file": sheet.name, "rule": told, "picture": picture})
    return sheets


def _linked(check: RecipeCheck, fault: str) -> dict[str, str]:
    """A fault and the name of the image that it is about, if the gallery has it."""
    names = ((Path(card["file"]).name, card["id"]) for card in check.images_shown.cards)
    return {"text": one_line(fault), "image": next((id_ for name, id_ in names if name in fault), "")}


def _pairs(check: RecipeCheck) -> list[dict[str, Any]]:
    """Pictures that are in two splits or in an evaluation set too, the most alike first."""
    cards = {card["id"]: card["picture"] for card in check.images_shown.cards}
    leaks = [*check.split_leaks, *(check.evaluation_leaks or [])]
    leaks.sort(key=lambda leak: -leak.likeness)
    return [_pair(leak, cards) for leak in leaks[:_PAIRS]]


def _pair(leak: Leak, cards: dict[str, str]) -> dict[str, Any]:
    sides = [{"id": name, "picture": cards.get(name) or _of_file(name)} for name in (leak.name, leak.other)]
    return {"sides": sides, "likeness": round(leak.likeness, 3)}


def _of_file(name: str) -> str:
    """The picture of an evaluation set's file; empty for an image of the recipe that the gallery does not show."""
    from umed_plugin.commands.report.pictures import as_data_url, see

    if not Path(name).is_file():
        return ""
    try:
        return as_data_url(see(name, "pad", None, Path(name).parent, 320).square)
    except UmedError:
        return ""


def _places(check: RecipeCheck) -> dict[str, Any]:
    """Sizes and positions of the boxes of each class."""
    return {
        name: {"sides": counts.places.sides, "centres": counts.places.centres} for name, counts in check.classes.items()
    }
