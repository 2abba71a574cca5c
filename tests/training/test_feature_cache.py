"""The tower's features on disk: runs with and without them are the same to the bit, and nothing stale or torn is used."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.records import grounded_records
from support.tuning import make_tokenizer
from support.umed_runs import INTERRUPT, ROOT, TWO_PROCESSES, environment, run_command, train_flags, umed_run, weights

from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.model.forward import encode_images
from umed_plugin.training.feature_cache import FeatureCache, FeatureShape, open_feature_cache
from umed_plugin.training.rewarding_data import QueryDataset, collate_queries

FLAGS = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 6 --num_train_epochs 2 --umed_log_candidates 1"
    " --umed_entropy_coef 0.01"  # answers of random weights earn nothing: something has to move the weights
)
NO_CHECKPOINTS = ["--save_strategy", "no"]
LORA = shlex.split("--lora_enable True --lora_r 4 --dataloader_num_workers 1")


def history(output):
    """Losses and rewards of every step, and the candidates; times and what only a cache logs are left out."""
    lines = json.loads((output / "trainer_state.json").read_text())["log_history"]
    hits = [line.pop("feature_cache_hits", None) for line in lines if "loss" in line]
    # The guards look back over steps, and a resumed run has seen fewer.
    steps = [
        {name: value for name, value in line.items() if not name.startswith("guard/")}
        for line in lines
        if "policy_loss" in line
    ]
    return steps, (output / "candidates.jsonl").read_text().splitlines(), hits


def spoil(image):
    """Make an image unreadable without a sign on the outside: same size, same time of change."""
    before = image.stat()
    image.write_bytes(bytes(before.st_size))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_two_processes_give_the_same_numbers_without_a_cache_with_an_empty_and_with_a_full_one(tiny_mistral, tmp_path):
    records, cache = grounded_records(tmp_path / "data"), tmp_path / "cache"
    for name, more in {
        "none": [],
        "empty": ["--umed_feature_cache", str(cache)],
        "full": ["--umed_feature_cache", str(cache)],
    }.items():
        if name == "full":  # with all features there, no image is opened
            for image in records.parent.glob("*.png"):
                spoil(image)
        run = umed_run(
            [
                *TWO_PROCESSES,
                *train_flags(tiny_mistral, records, tmp_path / name, *FLAGS, *NO_CHECKPOINTS, *LORA, *more),
            ]
        )
        assert run.returncode == 0, run.stderr[-3000:]
        if more:
            there = "9 of 9" if name == "full" else "0 of 9"
            assert run.stdout.count(f"{there} images are cached; 9 images x 64 patches") == 1
    expected, candidates, _ = history(tmp_path / "none")
    assert len(expected) == 6 and all(line["loss"] for line in expected)
    for name, hits in {"empty": [0, 0, 1, 1, 1], "full": [1] * 5}.items():
        found, texts, said = history(tmp_path / name)
        assert found == expected and texts == candidates
        # The last batch of an epoch is filled up with its first queries, which the other process may have encoded by then.
        assert [*said[:2], *said[3:]] == hits
    trained = weights(tmp_path / "none")
    for name in ("empty", "full"):
        found = weights(tmp_path / name)
        assert set(found) == set(trained) and all(torch.equal(found[key], trained[key]) for key in trained)


def test_a_run_that_is_killed_and_resumed_reads_what_it_has_written(tiny_llama, tmp_path):
    records, resumed = grounded_records(tmp_path / "data"), tmp_path / "resumed"
    flags = [*FLAGS, "--save_steps", "3", "--bf16", "True"]
    cached = [*flags, "--umed_feature_cache", str(tmp_path / "cache")]
    command = ["python", "-m", "llava.train.train_mem"]
    run = umed_run([*command, *train_flags(tiny_llama, records, tmp_path / "whole", *flags)])
    assert run.returncode == 0, run.stderr[-3000:]

    hook = tmp_path / "hook"
    hook.mkdir()
    state = str(resumed / "checkpoint-3" / "trainer_state.json")
    (hook / "sitecustomize.py").write_text(INTERRUPT.format(state=state, signal=int(signal.SIGKILL)))
    stopped = umed_run([*command, *train_flags(tiny_llama, records, resumed, *cached)], pythonpath=hook)
    assert stopped.returncode != 0 and not (resumed / "trainer_state.json").exists()
    run = umed_run([*command, *train_flags(tiny_llama, records, resumed, *cached)])
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"[1-9] of 9 images are cached", run.stdout), run.stdout[-3000:]
    expected, candidates, _ = history(tmp_path / "whole")
    found, texts, _ = history(resumed)
    assert len(expected) == 10 and all(line["loss"] for line in expected)
    assert found == expected and texts[-7:] == candidates[-7:]  # the stopped run got to step 3 or a little further
    expected, found = weights(tmp_path / "whole"), weights(resumed)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def tower(tiny_mistral):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    return CLIPVisionTower(str(tiny_mistral / "vision_tower"), SimpleNamespace(mm_vision_select_layer=-2)).float()


CHANGES = {
    "one weight": lambda tower, processor: next(tower.parameters()).data.view(-1)[0].add_(1e-3),
    "a buffer": lambda tower, processor: next(tower.buffers()).view(-1)[0].add_(1),
    "configuration": lambda tower, processor: tower.config.update({"layer_norm_eps": 1e-3}),
    "layer": lambda tower, processor: setattr(tower, "select_layer", -1),
    "feature": lambda tower, processor: setattr(tower, "select_feature", "cls_patch"),
    "number format": lambda tower, processor: tower.half(),
    "processor": lambda tower, processor: setattr(processor, "image_mean", [0.5, 0.5, 0.5]),
}


@pytest.mark.parametrize("change", [*CHANGES, "aspect ratio"])
def test_whatever_decides_the_features_decides_the_folder(tower, tmp_path, change):
    first = open_feature_cache(tmp_path, tower, tower.image_processor, "pad")
    tower.config.name_or_path = "elsewhere"
    assert open_feature_cache(tmp_path, tower, tower.image_processor, "pad").folder == first.folder
    if change != "aspect ratio":
        CHANGES[change](tower, tower.image_processor)
    other = open_feature_cache(tmp_path, tower, tower.image_processor, "square" if change == "aspect ratio" else "pad")
    assert other.folder != first.folder
    pixels = torch.zeros(1, 3, 64, 64, dtype=tower.dtype)
    if change != "number format":  # a CPU has no convolution in half precision
        assert other.shape.fits(tower(pixels)[0])
    assert " Other towers or preprocessing have 1 more folders beside it." in other.reserve([])


def test_a_tower_that_is_trained_is_refused(tower, tmp_path):
    next(tower.parameters()).requires_grad_(True)
    with pytest.raises(UmedError, match="1 parameters of the vision tower are trained.*freeze the tower"):
        open_feature_cache(tmp_path, tower, tower.image_processor, "pad")


SHAPE = FeatureShape(4, 3, torch.bfloat16)


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache" / "tower").mkdir(parents=True)
    return FeatureCache(tmp_path / "cache" / "tower", SHAPE)


def features(seed):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "torn": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flipped bit": flip_a_bit,
    "of another shape": lambda file: FeatureCache(file.parents[1], FeatureShape(1, 3, torch.bfloat16)).write(
        file.stem, features(1)[:1]
    ),
    "two checksums": lambda file: save_file({"features": features(1), "crc32": torch.tensor([1, 2])}, file),
    "a checksum that is no number": lambda file: save_file(
        {"features": features(1), "crc32": torch.tensor(float("nan"))}, file
    ),
    "no file": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_reported_and_made_anew(cache, capsys, damage):
    name = "ab" * 32
    cache.write(name, features(1))
    assert torch.equal(cache.read(name), features(1)) and cache.read("cd" * 32) is None
    assert capsys.readouterr().err == ""
    DAMAGE[damage](cache.file_of(name))
    assert cache.read(name) is None
    said = capsys.readouterr().err
    assert str(cache.file_of(name)) in said and "encoded anew" in said
    if damage == "no file":
        cache.file_of(name).rmdir()
    assert torch.equal(cache.complete([None], [name], lambda: features(1)[None])[0], features(1))
    assert torch.equal(cache.read(name), features(1))


def test_gaps_are_filled_in_order_and_without_gaps_nothing_is_encoded(cache):
    names = ["aa", None, "cc", "dd"]
    found = [None, None, features(2), None]
    whole = cache.complete(found, names, lambda: torch.stack([features(0), features(1), features(3)]))
    assert torch.equal(whole, torch.stack([features(i) for i in range(4)]))
    assert [torch.equal(cache.read(name), features(i)) for i, name in ((0, "aa"), (3, "dd"))] == [True, True]
    assert cache.read("cc") is None
    again = cache.complete([cache.read("aa"), features(1)], ["aa", None], lambda: pytest.fail("nothing to encode"))
    assert torch.equal(again, torch.stack([features(0), features(1)]))


def test_another_state_of_an_image_has_another_name(cache, tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    name = cache.name_of(str(image))
    assert name == cache.name_of(str(image)) and len(name) == 64
    os.utime(image, ns=(1, image.stat().st_mtime_ns + 1))
    later = cache.name_of(str(image))
    image.write_bytes(b"another")
    assert len({name, later, cache.name_of(str(image))}) == 3
    shutil.copy2(image, tmp_path / "b.png")
    assert cache.name_of(str(tmp_path / "b.png")) != cache.name_of(str(image))
    assert cache.name_of(str(tmp_path / "none.png")) is None
    # Slices of one volume are different images.
    assert len({cache.name_of(str(image), {"slice": k, "window": "full"}) for k in (1, 2)} | {later}) == 3


def test_a_disk_without_room_is_refused_and_what_is_there_needs_none(cache, tmp_path):
    images = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for image in images:
        (tmp_path / image).write_bytes(b"")
    names = [cache.name_of(image) for image in images]
    said = cache.reserve([*names, *names, cache.name_of(str(tmp_path / "none.png"))])
    assert "0 of 2 images" in said and "2 images x 4 patches x 3 x torch.bfloat16 = 48 B" in said
    huge = FeatureCache(cache.folder, FeatureShape(10**12, 1024, torch.float16))
    with pytest.raises(
        UmedError, match=r"4096.0 TB.* still to be written .* free on the disk\. Choose a folder on another disk"
    ):
        huge.reserve(names)
    for image in images:
        cache.write(cache.name_of(image), features(0))
    assert "2 of 2 images" in huge.reserve(names)


def test_what_cannot_be_written_is_reported_once_and_the_run_goes_on(cache, capsys):
    (cache.folder / "aa").write_text("in the way")
    for name in ("aa", "bb"):
        assert torch.equal(cache.complete([None], [name], lambda: features(1)[None])[0], features(1))
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert cache.read("bb") is None
    with pytest.raises(UmedError, match="cannot be written"):
        open_feature_cache(cache.folder / "aa" / "below", *_tower_arguments())


def _tower_arguments():
    class Tower(torch.nn.Linear):
        config = SimpleNamespace(to_dict=dict)
        select_layer, select_feature, dtype, num_patches, hidden_size = -2, "patch", torch.float32, 4, 3

    return Tower(3, 3).requires_grad_(False), SimpleNamespace(to_dict=dict), "pad"


def _write_over_and_over(cache, seed):
    for i in range(300):
        cache.write(f"{i % 5:02d}", features(i % 5))
        read = cache.read(f"{(i + seed) % 5:02d}")
        assert read is None or torch.equal(read, features((i + seed) % 5))


def test_several_processes_write_and_read_the_same_entries(cache, capfd):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_over_and_over, args=(cache, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert "damaged" not in capfd.readouterr().err
    assert not list(cache.folder.rglob("*.partial"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def query_dataset(records, tokenizer, tower, **flags):
    data_args = SimpleNamespace(
        data_path=str(records),
        image_folder=str(records.parent),
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
        image_processor=tower.image_processor,
        umed_run=SimpleNamespace(model_args=SimpleNamespace(version="umed_v1")),
    )
    training_args = SimpleNamespace(
        umed=UmedFlags(umed_stage="rewarding", **flags),
        output_dir=str(records.parent / "out"),
        process_index=0,
        main_process_first=lambda **_: contextlib.nullcontext(),
    )
    return QueryDataset(tokenizer, data_args, training_args)


def epoch(dataset, tower):
    """Features and prompts of all records, one batch each, as the trainer gets them."""
    llava = SimpleNamespace(get_vision_tower=lambda: tower)
    seen = []
    for i in range(len(dataset)):
        batch = collate_queries([dataset[i]])
        whole = dataset.feature_cache.complete(
            batch["features"], batch["features_names"], lambda batch=batch: encode_images(llava, batch["images"])
        )
        seen.append((batch["records"][0]["id"], batch["prompt_ids"][0].tolist(), whole))
    return seen


def test_a_query_is_the_same_with_its_features_read(tokenizer, tower, tmp_path):
    records = grounded_records(tmp_path / "data")
    dataset = query_dataset(records, tokenizer, tower)
    assert "0 of 9 images" in dataset.use_feature_cache(tmp_path / "cache", tower)
    first, second = epoch(dataset, tower), epoch(dataset, tower)
    assert {dataset.template_of(i) for i in range(9)} == {"umed_v1", "llava_v1"}
    assert [query[:2] for query in first] == [query[:2] for query in second]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(first, second))
    assert dataset[0]["image"] is None and dataset[0]["features"].shape == (64, tower.hidden_size)


def test_a_changed_image_is_encoded_anew(tokenizer, tower, tmp_path):
    records = grounded_records(tmp_path / "data")
    dataset = query_dataset(records, tokenizer, tower)
    dataset.use_feature_cache(tmp_path / "cache", tower)
    first = epoch(dataset, tower)
    Image.new("RGB", (64, 48), "white").save(records.parent / "3.png")
    second = epoch(dataset, tower)
    assert [torch.equal(one[2], other[2]) for one, other in zip(first, second)] == [i != 3 for i in range(9)]


def test_a_bad_image_is_bad_in_every_epoch(tokenizer, tower, tmp_path):
    records = grounded_records(tmp_path / "data")
    (records.parent / "2.png").write_bytes(b"no image")
    dataset = query_dataset(records, tokenizer, tower, umed_on_bad_image="skip")
    dataset.use_feature_cache(tmp_path / "cache", tower)
    for _ in range(2):
        assert [query[0] for query in epoch(dataset, tower)][1:4] == ["record-1", "record-3", "record-3"]
    (records.parent / "3.png").unlink()  # its features are there, and yet it is gone
    assert [query[0] for query in epoch(dataset, tower)][1:4] == ["record-1", "record-4", "record-4"]
    dataset.flags.umed_on_bad_image = "stop"
    with pytest.raises(UmedError, match=r"record-2.*--umed_on_bad_image skip"):
        epoch(dataset, tower)


def test_only_images_without_features_have_to_be_readable_before_training(tokenizer, tower, tmp_path, capsys):
    records, flags = grounded_records(tmp_path / "data"), {"umed_feature_cache": str(tmp_path / "cache")}
    dataset = query_dataset(records, tokenizer, tower, **flags)
    dataset.use_feature_cache(tmp_path / "cache", tower)
    epoch(dataset, tower)
    spoil(records.parent / "0.png")
    query_dataset(records, tokenizer, tower, **flags).use_feature_cache(tmp_path / "cache", tower)

    (records.parent / "2.png").write_bytes(b"no image")
    with pytest.raises(UmedError, match=r"1 of 1 images cannot be trained on. record record-2: .*2\.png"):
        query_dataset(records, tokenizer, tower, **flags).use_feature_cache(tmp_path / "cache", tower)
    skipping = query_dataset(records, tokenizer, tower, **flags, umed_on_bad_image="skip")
    assert "8 of 9 images are cached" in skipping.use_feature_cache(tmp_path / "cache", tower)
    assert "1 of 1 images cannot be trained on" in capsys.readouterr().err
    (records.parent / "3.png").unlink()  # its features are there, and yet it is gone
    with pytest.raises(UmedError, match=r"1 of 9 image files are not there: record record-3"):
        query_dataset(records, tokenizer, tower, **flags)


@pytest.mark.run
def test_the_benchmark_prints_both_sides_and_what_is_saved():
    """Small sizes; that the losses agree is checked by the benchmark itself."""
    sizes = "--images 4 --candidates 2 --new-tokens 6 --tower 64 2 56 --model 64 1 --cpu-seconds"
    command = [sys.executable, str(ROOT / "benchmarks" / "feature_cache.py"), *sizes.split()]
    run = run_command(command, env=environment())
    assert run.returncode == 0, run.stderr[-3000:]
    (table,) = re.findall(r"median of 2 steps.*", run.stdout, re.DOTALL)
    rows = {
        line[:16].strip(): [float(cell.rstrip("%")) for cell in line[16:].split()] for line in table.splitlines()[2:]
    }
    assert list(rows) == ["data", "tower", "rest", "data + tower", "step"]
    for without, with_cache, saved in rows.values():
        assert saved == pytest.approx(100 * (1 - with_cache / without), abs=5), (
            "apart from the rounding of milliseconds"
        )
    assert rows["data + tower"][2] > 0
