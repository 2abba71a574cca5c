"""axe-core on an opened page: what people who use a keyboard, a screen reader or large text would stumble over.

Its script comes with the PyPI package `axe-core-python`, or is named by ``UMED_AXE`` (``axe.min.js`` of a newer axe-core).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.browser import Page

SIZES = ((1280, 900, False), (390, 844, True))


def axe_script() -> str:
    """The script; the test is skipped where there is none."""
    named = os.environ.get("UMED_AXE")
    if named:
        return Path(named).read_text(encoding="utf-8")
    found = find_spec("axe_core_python")
    if found is None or not found.submodule_search_locations:
        pytest.skip("there is no axe-core here: pip install axe-core-python, or UMED_AXE=/path/to/axe.min.js")
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


def findings(page: Page) -> list[str]:
    """All violations of an opened page, as "impact rule: places"."""
    if not page.run("typeof window.axe === 'object'"):
        page.run(axe_script() + "; null")
    found = page.run("axe.run(document, {resultTypes: ['violations']}).then(done => done.violations)")
    return [
        f"{one['impact']} {one['id']}: {'; '.join(' '.join(map(str, node['target'])) for node in one['nodes'][:3])}"
        for one in found
    ]


def assert_accessible(page: Page, what: str) -> None:
    """No violation at all, on a desktop and on a phone, in light and in dark."""
    wrong = {}
    for width, height, phone in SIZES:
        for dark in (False, True):
            page.shape(width, height, phone=phone, dark=dark)
            page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            if found := findings(page):
                wrong[f"{what}, {width} px, {'dark' if dark else 'light'}"] = found
    assert not wrong, wrong
