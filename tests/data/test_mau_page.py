"""The page docs/mau.md, from five downloads to ``mau.json``: every command as it stands, on made-up downloads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from support.forked_shells import programs
from support.source_files import write_sources

pytestmark = pytest.mark.one_stack
ROOT = Path(__file__).resolve().parents[2]


def page() -> str:
    return (ROOT / "docs" / "mau.md").read_text()


def commands() -> str:
    """The page's commands, the last two with the flag that it says to add for SLAKE."""
    block, _changed = re.findall(r"^```bash\n(.*?)^```$", page(), re.MULTILINE | re.DOTALL)
    assert "add `--against slake/imgs` to both commands" in page()
    changed, times = re.subn(
        r"^(umed recipe (?:check|build) mau .*)$", r"\1 --against slake/imgs", block, flags=re.MULTILINE
    )
    assert times == 2
    return changed


def pack(folder: Path, archive: Path, inside: str, names: list[str] | None = None) -> None:
    """Put what a folder holds (or some of it) into an archive, below ``inside``."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if names is None or path.relative_to(folder).parts[0] in names]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for path in files:
                packed.write(path, Path(inside) / path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz") as packed:
            for path in files:
                packed.add(path, Path(inside) / path.relative_to(folder))


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """The archives under the names and with the folders that the real ones have."""
    write_sources(tmp_path / "unpacked")
    source, target = tmp_path / "unpacked", tmp_path / "downloads"
    target.mkdir()
    series = sorted(path.name for path in (source / "DeepLesion" / "Images_png").iterdir())
    for number, names in enumerate((series[:10], series[10:]), start=1):
        pack(source / "DeepLesion" / "Images_png", target / f"Images_png_{number:02}.zip", "Images_png", names)
    shutil.copy(source / "DeepLesion" / "DL_info.csv", target)
    pack(source / "KidneyStone", target / "kidney-stone-images.zip", "")
    for name in ("BBox_List_2017.csv", "Data_Entry_2017_v2020.csv"):
        shutil.copy(source / "NIH" / name, target)
    for number, folder in enumerate(sorted((source / "NIH").glob("images_*")), start=1):
        pack(folder / "images", target / f"images_{number:02}.tar.gz", "images")
    pack(source / "TBX11K", target / "TBX11K.zip", "TBX11K")
    pack(source / "Kvasir-SEG", target / "kvasir-seg.zip", "Kvasir-SEG")
    evaluated = tmp_path / "slake" / "imgs" / "xmlab1"
    evaluated.mkdir(parents=True)
    # SLAKE took X-rays from NIH: here one is smaller and a JPEG.
    xray = min((source / "NIH").rglob("*_000.png"))
    Image.open(xray).convert("RGB").resize((512, 512)).save(evaluated / "source.jpg", quality=80)
    shutil.rmtree(source)
    return tmp_path


def test_the_page_is_one_page() -> None:
    assert len(page().splitlines()) <= 50


@pytest.mark.llava
def test_from_five_downloads_to_mau_json(downloads: Path) -> None:
    """Fewer pictures than the 5,817 are there, which is said and no fault."""
    if shutil.which("unzip") is None:
        pytest.skip("this machine has no unzip, which the page's commands call")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    places = f"{programs(downloads / 'programs')}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": places, "PYTHONPATH": path}
    command = ["bash", "-euo", "pipefail", "-c", commands()]
    run = subprocess.run(command, cwd=downloads, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]

    assert "of the 5,817 images that the mixture asks for are there" in run.stdout
    assert "1 pictures are in an evaluation set too" in run.stdout
    assert "The recipe fits the data." in run.stdout
    assert len(list((downloads / "mau" / "report").glob("sheet_*.png"))) == 5
    records = json.loads((downloads / "mau" / "built" / "mau.json").read_text())
    sources = Counter(record["source"] for record in records)
    assert set(sources) == {"deeplesion", "kidney_stone", "nih_cxr14", "tbx11k", "kvasir_seg"}
    assert not any(record["id"].endswith("00000001_000.png") for record in records)
    for record in records:
        assert (downloads / "mau" / "built" / record["image"]).is_file()
    splits: dict[tuple[str, str], set[str]] = {}
    for record in records:
        splits.setdefault((record["source"], record["patient"]), set()).add(record["split"])
    assert all(len(found) == 1 for found in splits.values())
