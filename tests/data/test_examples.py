"""The examples in the docstrings of what users call run as they stand."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

MODULES = {
    "umed_plugin.data.build": ["build_records"],
    "umed_plugin.data.recipes.readers": ["register_reader"],
    "umed_plugin.data.recipes.recipe": ["load_recipe"],
    "umed_plugin.data.records": ["load_records", "record_geometry", "save_records"],
    "umed_plugin.grounding.boxes": ["format_box", "parse_boxes", "set_iou"],
    "umed_plugin.grounding.geometry": ["ImageGeometry"],
    "umed_plugin.grounding.scoring": ["score_answer"],
}
READS_PIXELS = ("umed_plugin.data.build",)
WITH_MARKS = [pytest.param(name, marks=pytest.mark.llava) if name in READS_PIXELS else name for name in MODULES]


@pytest.mark.parametrize("module", WITH_MARKS)
def test_examples_run(module: str) -> None:
    """In a process of its own, since an example may register a reader. Only reading pixels needs torch, through MONAI."""
    reads_pixels = module in READS_PIXELS
    # Libraries that MONAI imports may print, which doctest would take for the example's output.
    code = f"import doctest, sys{', monai' if reads_pixels else ''}; import {module} as module\n"
    code += "r = doctest.testmod(module); print(r.attempted, 'torch' in sys.modules); sys.exit(r.failed)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    attempted, torch = run.stdout.splitlines()[-1].split()
    assert int(attempted) >= 2 * len(MODULES[module])
    assert torch == str(reads_pixels)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in MODULES[module]])
def test_each_has_an_example(module: str, name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(__import__(module, fromlist=[name]), name))
    assert any(test.examples for test in found)
