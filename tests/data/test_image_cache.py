"""The image cache: the same tensor to the bit, nothing stale, nothing above its bound, whoever writes to it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava.mm_utils import process_images
from PIL import Image
from support.drawn import BOX, bright_box, scene, write_dicom, write_nifti, write_png, write_png16
from support.tuning import make_dataset
from support.umed_runs import ROOT
from transformers import CLIPImageProcessor

from umed_plugin.data.images import load_image
from umed_plugin.data.images.cache import ImageCache
from umed_plugin.errors import UmedError

SIZE = 56
ENTRY = 32 + 3 * SIZE * SIZE + 4


def make_processor(**settings: Any) -> Any:
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, **settings)


def make_cache(folder: Path, mode: str = "pad", slots: int = 1000, **settings: Any) -> ImageCache:
    return ImageCache(folder, make_processor(**settings), mode, slots * ENTRY)


def plain(image: Image.Image, mode: str) -> torch.Tensor:
    """As LLaVA does it at inference."""
    config = type("Config", (), {"image_aspect_ratio": mode})
    return process_images([image], make_processor(), config)[0]


def entries(folder: Path) -> list[Path]:
    return list(folder.rglob("*.square"))


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_the_tensor_is_llavas_to_the_bit_cold_and_warm(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0).random((61, 97))
    dicom = write_dicom(tmp_path / "a.dcm", noise, orientation=[-1, 0, 0, 0, 1, 0])
    nifti = write_nifti(tmp_path / "a.nii.gz", np.stack([noise.T, noise.T * 0.5], axis=2), np.eye(4))
    deep = write_png16(tmp_path / "deep.png", noise)
    cases: list[tuple[Path, dict[str, Any]]] = [
        (write_png(tmp_path / "a.png", noise, "RGBA"), {}),
        (dicom, {"window": "lung"}),
        (dicom, {"window": [[-1000, 0], "bone", "soft_tissue"]}),
        (nifti, {"slice": 1, "window": "full"}),
        (deep, {"offset": 32768, "window": [-500, 500]}),
    ]
    Image.fromarray(np.uint8(noise * 255)).save(tmp_path / "a.jpg")
    cases.append((tmp_path / "a.jpg", {}))
    cache = make_cache(tmp_path / "cache", mode)
    for path, reading in cases:
        shown = Image.open(path).convert("RGB") if not reading else Image.fromarray(load_image(path, **reading)[0])
        expected = plain(shown, mode)
        for _ in range(2):
            assert torch.equal(cache.pixels(path, reading), expected)
    assert (cache.misses, cache.hits) == (len(cases), len(cases))
    again = make_cache(tmp_path / "cache", mode)
    for path, reading in cases:
        again.pixels(path, reading)
    assert (again.misses, again.hits) == (0, len(cases))


def test_whatever_an_image_depends_on_makes_it_another_one(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", scene())
    make_cache(tmp_path / "cache").pixels(path, {"window": "lung"})
    for mode, settings, reading in [
        ("square", {}, {"window": "lung"}),
        ("pad", {"image_mean": [0.5, 0.5, 0.5]}, {"window": "lung"}),
        ("pad", {}, {"window": "bone"}),
        ("pad", {}, {"window": "lung", "orientation": "as_stored"}),
    ]:
        cache = make_cache(tmp_path / "cache", mode, **settings)
        cache.pixels(path, reading)
        assert cache.misses == 1


def test_a_changed_file_is_decoded_anew(tmp_path: Path) -> None:
    """Of the same size, a moment later."""
    cache = make_cache(tmp_path / "cache")
    path = write_dicom(tmp_path / "a.dcm", scene())
    before = cache.pixels(path)
    size = path.stat().st_size
    write_dicom(path, scene((50, 20, 60, 50)))
    assert path.stat().st_size == size
    after = cache.pixels(path)
    assert not torch.equal(before, after)
    assert torch.equal(after, plain(Image.fromarray(load_image(path)[0]), "pad"))


def test_a_damaged_entry_is_reported_and_replaced(tmp_path: Path, capfd: Any) -> None:
    cache = make_cache(tmp_path / "cache")
    path = write_png(tmp_path / "a.png", scene())
    expected = cache.pixels(path)
    (entry,) = entries(tmp_path / "cache")
    content = bytearray(entry.read_bytes())
    for damaged in (content[:-100], content[:500] + bytes([content[500] ^ 1]) + content[501:]):
        entry.write_bytes(damaged)
        assert torch.equal(cache.pixels(path), expected)
        assert "is damaged. The image is decoded again" in capfd.readouterr().err
    cache.pixels(path)
    assert cache.hits == 1
    assert "damaged" not in capfd.readouterr().err


def test_it_never_holds_more_than_its_bound(tmp_path: Path) -> None:
    paths = [write_png(tmp_path / f"{i}.png", scene((i, i, i + 20, i + 20))) for i in range(30)]
    cache = make_cache(tmp_path / "cache", slots=8)
    for _ in range(2):
        for path in paths:
            cache.pixels(path)
            held = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
            assert held <= 8 * ENTRY
    # What is wanted in this run is not thrown out for what is wanted in this run.
    assert cache.hits >= 6
    smaller = make_cache(tmp_path / "cache", slots=3)
    assert len(entries(tmp_path / "cache")) == 3
    for file in entries(tmp_path / "cache"):
        os.utime(file, (time.time() - 99, time.time() - 99))
    for path in paths:
        smaller.pixels(path)
    # A later run may have the places of what nobody has used since.
    assert [time.time() - file.stat().st_mtime < 60 for file in entries(tmp_path / "cache")] == [True] * 3


def _read_all(folder: Path, paths: list[Path], expected: list[torch.Tensor], faults: Any, rounds: int | None) -> None:
    """``rounds`` over the images, or without end."""
    cache = make_cache(folder, slots=12)
    for _ in itertools.count() if rounds is None else range(rounds):
        for path, tensor in zip(paths, expected):
            if not torch.equal(cache.pixels(path), tensor):
                faults.put(str(path))


def test_processes_share_it_and_one_may_be_killed(tmp_path: Path) -> None:
    """Fewer places than images, so they replace each other's entries; one process is killed at work."""
    paths = [write_png(tmp_path / f"{i}.png", scene((i, i, i + 20, i + 20))) for i in range(16)]
    expected = [plain(Image.open(path).convert("RGB"), "pad") for path in paths]
    context = multiprocessing.get_context("fork")
    faults = context.Queue()
    torch.set_num_threads(1)
    given = (tmp_path / "cache", paths, expected, faults)
    workers = [context.Process(target=_read_all, args=(*given, rounds), daemon=True) for rounds in (None, 6, 6)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 60
    while not entries(tmp_path / "cache"):
        assert time.monotonic() < end
        time.sleep(0.005)
    workers[0].kill()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    assert faults.empty()
    assert len(entries(tmp_path / "cache")) <= 12
    cache = make_cache(tmp_path / "cache", slots=12)
    for path, tensor in zip(paths, expected):
        assert torch.equal(cache.pixels(path), tensor)


def test_a_file_that_another_process_renames_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "cache", slots=2)
    partial = tmp_path / "cache" / "7.square.0123abcd.partial"
    partial.touch()
    with os.scandir(partial.parent) as listed:
        (entry,) = [file for file in listed if file.name == partial.name]
    partial.unlink()
    monkeypatch.setattr("umed_plugin.data.images.cache._files", lambda folder: iter([entry]))
    make_cache(tmp_path / "cache", slots=2)


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UmedError, match="is too small; one image needs 9444"):
        make_cache(tmp_path / "cache", slots=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UmedError, match="cannot be used as an image cache"):
        make_cache(tmp_path / "file")

    class Sharpening(CLIPImageProcessor):
        def preprocess(self, images: Any, **options: Any) -> Any:
            found = super().preprocess(images, **options)
            if options.get("do_resize", True) and options.get("do_normalize", True):
                found["pixel_values"] = [found["pixel_values"][0] * 1.5]
            return found

    processor = Sharpening(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    with pytest.raises(UmedError, match="cannot be used with Sharpening"):
        ImageCache(tmp_path / "cache", processor, "pad", 10**6)


@pytest.mark.skipif(sys.platform != "linux", reason="the way to a folder that cannot be written")
def test_a_folder_that_goes_away_ends_the_writing_and_not_the_run(tmp_path: Path, capfd: Any) -> None:
    cache = make_cache(tmp_path / "cache")
    path = write_png(tmp_path / "a.png", scene())
    cache.folder.rmdir()
    cache.folder.write_text("a file in its place")
    for _ in range(2):
        assert torch.equal(cache.pixels(path), plain(Image.open(path).convert("RGB"), "pad"))
    assert capfd.readouterr().err.count("without caching more images") == 1


def test_training_reads_through_it(records: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Items stay LLaVA's own, and the second epoch opens no image."""
    plain_items = make_dataset(records, tokenizer)
    cached = make_dataset(records, tokenizer, umed_image_cache=str(tmp_path / "cache"))
    for index in range(3):
        theirs, ours = plain_items[index], cached[index]
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (cached.image_cache.misses, cached.image_cache.hits) == (3, 0)
    assert torch.equal(cached[1]["image"], plain_items[1]["image"])
    assert cached.image_cache.hits == 1


def test_a_box_of_a_slice_that_is_read_where_it_lies_is_on_the_lesion(tmp_path: Path) -> None:
    """Records without rendering: the picture that training sees under the record's reading has its box on the lesion."""
    from support.drawn import write_recipe

    from umed_plugin.data.build import build_records
    from umed_plugin.data.recipes.recipe import load_recipe
    from umed_plugin.data.records import record_geometry

    volume = np.full((97, 61, 3), 0.1)
    volume[:, :, 1] = scene().T
    write_nifti(tmp_path / "v.nii.gz", volume, np.diag([0.7, 0.7, 3, 1]))
    (tmp_path / "a.csv").write_text('file,box,lesion,slice\nv.nii.gz,"11, 7, 42, 19",nod,1\n')
    annotations = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion, slice: slice}}"
    recipe = load_recipe(write_recipe(tmp_path, annotations, extra="image: {window: full, box_frame: stored}\n"))
    (record,) = build_records(recipe, out_dir=tmp_path / "out", render=False)
    assert record["image"] == str(tmp_path / "v.nii.gz")
    assert not (tmp_path / "out").exists()
    (rendered,) = build_records(recipe, out_dir=tmp_path / "out")
    same = ("id", "objects", "image_size", "conversations")
    assert [record[name] for name in same] == [rendered[name] for name in same]
    pixels = make_cache(tmp_path / "cache").pixels(record["image"], record["reading"])
    with Image.open(tmp_path / "out" / rendered["image"]) as image:
        assert torch.equal(pixels, plain(image.convert("RGB"), "pad"))
        assert bright_box(np.asarray(image)) == tuple(record["objects"]["bbox"][0])
    assert tuple(record["objects"]["bbox"][0]) != BOX
    (x1, y1, x2, y2) = record_geometry(record).to_square(record["objects"]["bbox"])[0]
    rows, columns = np.nonzero(pixels[0].numpy() > 1)
    assert np.allclose(
        [columns.min() / SIZE, rows.min() / SIZE, (columns.max() + 1) / SIZE, (rows.max() + 1) / SIZE],
        [x1, y1, x2, y2],
        atol=1.5 / SIZE,
    )


def test_an_entry_of_an_earlier_version_is_a_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by commit 6baa41d for ``/data/scan.png``, with the processor's settings as in ``processor.json``."""
    old = ROOT / "tests" / "support" / "old" / "image_cache"
    shutil.copytree(old, tmp_path / "cache")
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = process_images(
        [Image.open(old / "scan.png").convert("RGB")],
        processor,
        type("Config", (), {"image_aspect_ratio": "pad"}),
    )[0]
    # Transformers tells these settings in other words from version to version, and the scan lay elsewhere.
    settings = json.loads((old / "processor.json").read_text())
    monkeypatch.setattr(processor, "to_dict", lambda: settings)
    monkeypatch.setattr(
        "umed_plugin.data.images.cache.file_states", lambda path: [("scan.png", 141, 1_000_000_000_000_000_000)]
    )
    cache = ImageCache(tmp_path / "cache", processor, "pad", 100 * 804)
    assert torch.equal(cache.pixels("/data/scan.png"), expected)
    assert (cache.hits, cache.misses) == (1, 0)
