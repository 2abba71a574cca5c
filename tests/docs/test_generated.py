"""The generated parts of docs/ are what the code says.

``UMED_WRITE_DOCS=1 python -m pytest tests/docs/test_generated.py`` writes them anew.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.pages import DOCS, check_generated, check_page, table
from support.python_api import python_api

from umed_plugin.data.recipes.reference import recipe_reference
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.needs import rules_of
from umed_plugin.flags.rules import STAGES


def test_the_table_of_flags_is_what_the_code_has() -> None:
    rows = [["flag", "stage", "default", "what it does"]]
    for flag in dataclasses.fields(UmedFlags):
        stages = ", ".join(str(STAGES.index(stage) + 1) for stage in rules_of(flag).stages)
        default = "" if flag.default is None else f"`{flag.default}`"
        rows.append([f"`--{flag.name}`", stages, default, flag.metadata["help"]])
    check_generated(DOCS / "flags.md", "flags", table(rows))


def test_the_table_of_patches_is_what_the_code_has() -> None:
    from umed_plugin.patches import ALL

    rows = [["patch", "changes or relies on", "of", "without it", "can go when"]]
    for patch in ALL:
        targets = "<br>".join(dict.fromkeys(f"`{target.path.partition(':')[2]}`" for target in patch.targets))
        libraries = "<br>".join(sorted({f"{target.library} {target.versions}" for target in patch.targets}))
        rows.append([f"`{patch.name}`", targets, libraries, patch.why, patch.delete_when])
    check_generated(DOCS / "patches.md", "patches", table(rows))


def test_the_table_of_findings_is_what_the_code_has() -> None:
    from umed_plugin.commands.doctor.catalogue import GROUPS
    from umed_plugin.commands.doctor.environment import ENVIRONMENT

    rows = [["finding", "severity", "what is found", "what it leads to", "`--fix`"]]
    for kinds in (*GROUPS.values(), ENVIRONMENT):
        rows += [[f"`{kind.code}`", kind.severity, kind.what, kind.why, kind.fix] for kind in kinds]
    check_generated(DOCS / "doctor.md", "findings", table(rows))


def test_the_table_of_benchmarks_is_what_the_code_has() -> None:
    from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
    from umed_plugin.evaluation.benchmarks.recipe import RECIPE

    rows = [["`--benchmark`", "what is asked", "`--data-root` holds", "metrics"]]
    rows.append(["`mau`, any recipe, a JSON of records", RECIPE.title, RECIPE.needs, RECIPE.reported])
    for listed in BENCHMARKS.values():
        title = f"{listed.title} ([source]({listed.url.split(' ')[0]}))"
        rows.append([f"`{listed.name}`", title, listed.needs, listed.reported])
    check_generated(DOCS / "evaluation.md", "benchmarks", table(rows))


def test_the_table_of_benchmarks_of_recipes_is_what_the_code_has() -> None:
    from umed_plugin.evaluation.benchmarks.catalogue import OF_RECIPES

    rows = [["`--benchmark`", "what is asked", "metrics"]]
    rows += [[f"`{name}:RECIPE`", item.benchmark.title, item.benchmark.reported] for name, item in OF_RECIPES.items()]
    check_generated(DOCS / "evaluation.md", "benchmarks-of-recipes", table(rows))


def test_the_recipe_reference_is_what_the_models_say() -> None:
    check_page(DOCS / "recipe-reference.md", recipe_reference())


@pytest.mark.llava
def test_the_python_api_is_what_the_package_exports() -> None:
    check_page(DOCS / "python-api.md", python_api())


def test_a_page_that_is_out_of_date_is_named_and_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    monkeypatch.delenv("UMED_WRITE_DOCS", raising=False)
    with pytest.raises(AssertionError, match=r"page.md is out of date: UMED_WRITE_DOCS=1 "):
        check_generated(page, "a", "new\n")
    monkeypatch.setenv("UMED_WRITE_DOCS", "1")
    check_generated(page, "a", "new\n")
    assert page.read_text() == "before\n<!-- a -->\n\nnew\n\n<!-- /a -->\nafter\n"
    monkeypatch.delenv("UMED_WRITE_DOCS")
    check_generated(page, "a", "new\n")
