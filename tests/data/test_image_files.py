"""The images of a records file are looked for before training, and those that LLaVA's reader would show otherwise are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from umed_plugin.data import image_files
from umed_plugin.data.image_files import check_image_files
from umed_plugin.errors import UmedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b c.png", "sub/d.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    return tmp_path


def check(folder: Path, *names: str, skip: bool = False, by_llava: bool = True) -> None:
    items: list[dict[str, Any]] = [{"image": name} for name in names] + [{"id": "without an image"}]
    check_image_files(items, str(folder), "train.json", skip=skip, opened_by_llava=by_llava)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gone.png", "Relative names are looked for in --image_folder"),
        (" a.png ", "There is 'a.png'"),
        ("sub\\d.png", "There is 'sub/d.png'"),
        ("b%20c.png", "There is 'b c.png'"),
        ("/a.png", "There is 'a.png'"),
        ("images/a.png", "There is 'a.png'"),
        ("https://host/a.png", "LLaVA reads files, not addresses"),
        ("data:image/png;base64,iVBORw0KGgo" + "A" * 5000, "an image's content, not a file"),
        ("sub", "Relative names"),
        ("a\0.png", "Relative names"),
    ],
)
def test_a_missing_image_is_told_before_training_with_what_was_probably_meant(
    folder: Path, name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UmedError, match="1 of 3 image files are not there") as caught:
        check(folder, "a.png", name, "b c.png", "a.png")
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 800
    check(folder, "a.png", name, "b c.png", skip=True)
    assert "1 of 3 image files are not there" in capsys.readouterr().err
    with pytest.raises(UmedError, match="none of the 1 images can be read"):
        check(folder, name, skip=True)


def test_a_file_of_more_than_8_bits_is_refused_where_llava_opens_it(folder: Path) -> None:
    deep = np.full((30, 40), 900, np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    with pytest.raises(UmedError, match="2 of 3 images cannot be trained on") as caught:
        check(folder, "a.png", "deep.png", "deep.tif")
    assert "more than 8 bits (mode I;16)" in str(caught.value)
    check(folder, "a.png", "deep.png", "deep.tif", by_llava=False)


def test_pages_that_nobody_sees_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [Image.new("L", (40, 30), value) for value in (0, 60, 120)]
    pages[0].save(folder / "p.tif", save_all=True, append_images=pages[1:])
    check(folder, "a.png", "p.tif")
    assert "1 of 2 images have several pages, such as 'p.tif'" in capsys.readouterr().err


def test_of_very_many_files_a_sample_is_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MOST_LOOKED_FOR", 10)
    with pytest.raises(UmedError, match=r"9 of 10 looked at \(of 100\) image files are not there"):
        check(folder, "a.png", *(f"{i}.png" for i in range(99)))
