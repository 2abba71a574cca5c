"""PNG, JPEG and other pictures: Pillow alone gives what MONAI's reader gives, and nothing of torch is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drawn import write_recipe
from support.umed_runs import environment

from umed_plugin.data.images import check_picture, open_image, shown_size
from umed_plugin.data.images.raster import DEEP_MODES, read_raster
from umed_plugin.errors import UmedError
from umed_plugin.grounding.geometry import exif_orientation

HEAVY = ("torch", "monai", "transformers", "bitsandbytes", "peft", "llava")
# Mode -> endings of files that hold it.
MODES = {
    "1": ("png", "bmp", "tif"),
    "L": ("png", "jpg", "bmp", "tif", "gif", "webp"),
    "LA": ("png",),
    "P": ("png", "bmp", "gif"),
    "RGB": ("png", "jpg", "bmp", "tif", "webp"),
    "RGBA": ("png", "tif", "webp"),
    "CMYK": ("jpg", "tif"),
    "YCbCr": ("jpg",),
    "I;16": ("png", "tif"),
    "I": ("tif",),
    "F": ("tif",),
}


def drawn(mode: str) -> Image.Image:
    """A picture of 37 x 23 pixels without symmetry, in the mode."""
    values = np.add.outer(np.arange(23) * 131, np.arange(37) ** 2 * 7)
    if mode == "I;16":
        return Image.fromarray((values * 9 % 65536).astype(np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray((values - 700).astype({"I": np.int32, "F": np.float32}[mode]))
    colours = np.stack([values % 256, values // 3 % 256, values // 7 % 256], axis=2).astype(np.uint8)
    return Image.fromarray(colours).convert(mode)


def by_monai(path: Path) -> np.ndarray:
    """As MONAI's reader gives it, converted as LLaVA does."""
    from monai.data import PILReader

    def converted(image: Image.Image) -> Image.Image:
        return image if image.mode in DEEP_MODES else image.convert("RGB")

    reader = PILReader(converter=converted, reverse_indexing=False)
    return reader.get_data(reader.read(path))[0]


@pytest.mark.llava
@pytest.mark.parametrize(("mode", "ending"), [(mode, ending) for mode in MODES for ending in MODES[mode]])
def test_values_are_those_of_monais_reader_bit_for_bit(mode: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{ending}"
    drawn(mode).save(path)
    found, expected = read_raster(path, offset=0), by_monai(path)
    deep = not found.is_grey_levels
    assert deep == (mode in ("I;16", "I", "F"))
    assert found.values.dtype == (np.float32 if deep else np.uint8)
    assert np.array_equal(found.values, expected.astype(np.float32) if deep else expected)


@pytest.mark.llava
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_right_or_refused(orientation: int, mode: str, compression: str, tmp_path: Path) -> None:
    """Some versions of Pillow mix up rows and columns of a file that they map into memory, and LLaVA would train on it."""
    path, stored = tmp_path / "a.tif", np.asarray(drawn(mode))
    drawn(mode).save(path, tiffinfo={274: orientation}, compression=compression)
    right = exif_orientation(orientation, 37, 23).apply_array(stored)
    if mode == "L":
        right = np.repeat(right[:, :, None], 3, axis=2)
    size = (right.shape[1], right.shape[0])
    try:
        read = read_raster(path, offset=0)
    except UmedError as error:
        assert compression == "raw" and orientation >= 5 and "Save it compressed or without the tag" in str(error)
        for reading in (open_image, shown_size) if mode == "I;16" else (open_image, shown_size, check_picture):
            with pytest.raises(UmedError, match="Save it compressed"):
                reading(path)
        return
    np.testing.assert_array_equal(read.values, right)
    assert shown_size(path) == size == open_image(path).size
    if mode != "I;16":
        np.testing.assert_array_equal(np.asarray(open_image(path)), right)
        check_picture(path)


@pytest.mark.llava
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" * 9, "half"])
def test_what_cannot_be_read_is_said_in_the_words_of_monais_reader(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    drawn("RGB").save(path)
    path.write_bytes(path.read_bytes()[:300] if isinstance(content, str) else content)
    with pytest.raises((OSError, SyntaxError, ValueError)) as theirs:
        by_monai(path)
    with pytest.raises(UmedError) as ours:
        read_raster(path, offset=0)
    reason = str(theirs.value).replace(str(path), path.name)
    assert f"{path}: cannot be read as an image ({type(theirs.value).__name__}: {reason}; " in str(ours.value)


def test_a_check_of_pictures_imports_nothing_of_torch(tmp_path: Path) -> None:
    """In a process of its own: eight bits and sixteen, read directly and by the command."""
    rows = ["f,x1,y1,x2,y2,c"]
    for number, ending in enumerate(("png", "jpg", "tif")):
        drawn("L").save(tmp_path / f"{number}.{ending}")
        rows.append(f"{number}.{ending},3,3,20,20,nod")
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    drawn("I;16").save(tmp_path / "deep.png")
    recipe = write_recipe(tmp_path, "{reader: csv, files: a.csv, columns: {file: f, box: [x1, y1, x2, y2], lesion: c}}")
    code = (
        "import sys; from umed_plugin.cli import main; from umed_plugin.data.images import load_image;"
        f"assert load_image({str(tmp_path / 'deep.png')!r})[0].shape == (23, 37, 3);"
        f"status = main(['recipe', 'check', {str(recipe)!r}, '--quiet']);"
        f"print(status, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stdout + done.stderr
    assert "The recipe fits the data" in done.stdout
