"""Annotation readers of the user's own, with and without options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.annotation_formats import by_name, read, two_images
from support.drawn import write_recipe

from umed_plugin.data.recipes.readers import READERS
from umed_plugin.errors import UmedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_images(tmp_path)


def test_a_users_own_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_reader.py").write_text(
        "from umed_plugin.data.annotations import Annotated\n"
        "def read(options, root, faults):\n"
        "    return [Annotated(root / 'pos.png', [(1, 2, 3, 4)], [options.label], 'here')]\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    items = by_name(read(folder, "{reader: 'my_reader:read', files: x, label: cy}"))
    assert items["pos.png"].classes == ["cyst"]


OWN_READER = """
from pydantic import Field

from umed_plugin.data.annotations import Annotated, ReaderOptions, register_reader


class SpotOptions(ReaderOptions):
    yaml_example_ = "annotations: {reader: spots, files: a.txt, label: nod}"

    label: str = Field(description="Class of every spot.")
    side: int = Field(2, gt=0, description="Side of the box around a spot, in pixels.")


@register_reader("spots", SpotOptions)
def read_spots(options, root, faults):
    return [Annotated(root / "pos.png", [(1, 2, 1 + options.side, 2 + options.side)], [options.label], "here")]
"""


def test_a_users_own_reader_with_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(READERS)
    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))
    (folder / "spot_reader.py").write_text(OWN_READER)
    monkeypatch.syspath_prepend(str(folder))
    by_path = "{reader: 'spot_reader:read_spots', files: x, label: cy, side: 3}"
    assert by_name(read(folder, by_path))["pos.png"].boxes == [(1, 2, 4, 5)]
    # Imported by now, so that its name will do.
    assert by_name(read(folder, "{reader: spots, files: x, label: nod}"))["pos.png"].boxes == [(1, 2, 3, 4)]
    with pytest.raises(UmedError) as caught:
        read(folder, by_path.replace("side: 3", "sied: 0"))
    assert "annotations.sied: unknown key 'sied'. Did you mean 'side'? Allowed: files, image_root" in str(caught.value)
    with pytest.raises(UmedError, match=r"annotations.label: missing. Class of every spot."):
        read(folder, "{reader: spots, files: x}")


@pytest.mark.filterwarnings("error:Field name .* shadows an attribute:UserWarning")
def test_a_users_own_reader_may_take_any_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that the models use for themselves are none that a recipe would use."""
    list(READERS)
    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))
    keys = "    example: str = Field(description='An example.')\n    filled_in: str = Field('cy', description='A class.')\n\n"
    text = OWN_READER.replace("    label: str", f"{keys}    label: str").replace(
        "[options.label]", "[options.filled_in]"
    )
    (folder / "key_reader.py").write_text(text.replace("spots", "spots_of_keys"))
    monkeypatch.syspath_prepend(str(folder))
    keys = "{reader: 'key_reader:read_spots_of_keys', files: x, label: nod, example: a"
    assert by_name(read(folder, f"{keys}}}"))["pos.png"].classes == ["cyst"]
    assert by_name(read(folder, f"{keys}, filled_in: nod}}"))["pos.png"].classes == ["nodule"]
    with pytest.raises(UmedError, match=r"unknown key 'exampel'. Did you mean 'example'\? Allowed: .*filled_in"):
        read(folder, f"{keys}, exampel: b}}")
    with pytest.raises(UmedError, match=r"annotations.example: missing. An example\."):
        read(folder, keys.replace(", example: a", "}"))


@pytest.mark.parametrize("module", ["data.annotations", "data.recipes.readers"])
def test_the_name_of_a_shipped_reader_is_refused_at_the_users_line(folder: Path, module: str) -> None:
    """In a fresh process, in which the shipped reader has not been imported by then."""
    (folder / "clash.py").write_text(
        f"from umed_plugin.{module} import register_reader\n\n@register_reader('mask')\n"
        "def read(options, root, faults):\n    return []\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    run = subprocess.run([sys.executable, "-c", "import clash"], env=environment, capture_output=True, text=True)
    assert "ValueError: annotation reader 'mask' is registered already, as <function read_mask" in run.stderr
    assert 'clash.py", line 3, in <module>' in run.stderr


def test_an_own_reader_that_does_not_exist(folder: Path) -> None:
    with pytest.raises(UmedError, match=r"annotations.reader: annotation reader 'no_reader:read': there is no module"):
        read(folder, "{reader: 'no_reader:read', files: x}")


def test_a_new_format_is_one_new_file(folder: Path) -> None:
    """A module beside the shipped readers is enough: nothing else names it."""
    (folder / "formats").mkdir()
    (folder / "formats" / "spots.py").write_text(OWN_READER)
    recipe = write_recipe(folder, "{reader: spots, files: x, label: cy}")
    code = f"""
from umed_plugin.data import annotations
annotations.__path__.append({str(folder / "formats")!r})
from umed_plugin.data.recipes.readers import READERS
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError
from umed_plugin.data.recipes.reference import recipe_reference
(item,) = annotations.read_annotations(load_recipe({str(recipe)!r})).items
print(item.boxes, item.classes, "| `side` | whole number, above 0 | `2` |" in recipe_reference())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[(1, 2, 3, 4)] ['cyst'] True\n", run.stderr
