"""MedMNIST: its arrays as they are published, odd ones, and metrics by hand."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from support.benchmark_files import mnist, questions_of
from support.benchmark_runs import metrics_of

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.medmnist import write_images

pytestmark = pytest.mark.one_stack


def test_medmnist_by_hand(tmp_path):
    root = mnist(tmp_path / "mnist")
    questions = questions_of("medmnist", root)
    per_set = {
        name: sum(q.groups["part"] == name for q in questions)
        for name in ("pneumoniamnist", "dermamnist", "chestmnist")
    }
    assert per_set == {"pneumoniamnist": 6, "dermamnist": 6, "chestmnist": 6 * 14}
    mine = [question for question in questions if question.groups["part"] == "pneumoniamnist"]
    assert [question.truth for question in mine] == ["normal", "pneumonia"] * 3
    with np.load(root / "pneumoniamnist.npz") as arrays:
        assert np.array_equal(np.asarray(Image.open(mine[3].image)), arrays["test_images"][3]), "written without loss"
    # Losses (normal, pneumonia) -> score of pneumonia rises with the first and falls with the second.
    losses = [(1, 2), (2, 1), (1, 3), (1, 1.5), (2, 1), (1, 2)]
    # Scores by loss difference: normal -1, -2, +1; pneumonia +1, -0.5, -1. Pairs won: 2.5 (tie with +1) + 2 + 1.5 (tie with -1).
    found = metrics_of("medmnist", mine, [("", pair) for pair in losses])
    assert found["auc/pneumoniamnist"] == pytest.approx(6 / 9)
    assert found["acc/pneumoniamnist"] == pytest.approx(3 / 6)


def test_pictures_are_those_of_the_data_file_as_it_is_also_of_an_older_one(tmp_path):
    root = mnist(tmp_path / "mnist")
    question = next(q for q in questions_of("medmnist", root) if q.groups["part"] == "pneumoniamnist")
    file = root / "pneumoniamnist.npz"
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "test_images": 255 - arrays["test_images"]})
    os.utime(file, ns=(1_000_000_000, 1_000_000_000))
    before = np.asarray(Image.open(question.image))
    write_images([question])
    assert np.array_equal(np.asarray(Image.open(question.image)), 255 - before)
    written = os.stat(question.image).st_ino
    write_images([question])
    assert os.stat(question.image).st_ino == written, "it is up to date"


@pytest.mark.parametrize(
    ("later", "writable", "kept"),
    [(-1, True, True), (2, True, True), (-3, True, False), (3, True, False), (3, False, True), (-3, False, False)],
)
def test_a_picture_whose_time_was_lost_is_taken_where_nothing_can_be_written(
    tmp_path, monkeypatch, later, writable, kept
):
    """A disk may keep whole seconds; a copy made by ``cp -r`` is newer, and its folder may be read-only."""
    root = mnist(tmp_path / "mnist")
    question = next(q for q in questions_of("medmnist", root) if q.groups["part"] == "pneumoniamnist")
    changed = os.stat(root / "pneumoniamnist.npz").st_mtime_ns + later * 10**9
    os.utime(question.image, ns=(changed, changed))
    monkeypatch.setattr(os, "access", lambda folder, mode: writable)  # root may write into any folder
    before = os.stat(question.image).st_ino
    write_images([question])
    assert (os.stat(question.image).st_ino == before) == kept


def test_several_labels_are_asked_one_by_one_about_one_image(tmp_path, short_bootstrap):
    questions = [q for q in questions_of("medmnist", mnist(tmp_path / "mnist")) if q.groups["part"] == "chestmnist"]
    assert len({question.image for question in questions}) == 6 and not any(question.write for question in questions)
    right = [("", (2, 1) if question.truth == "yes" else (1, 2)) for question in questions]
    found = metrics_of("medmnist", questions, right)
    assert found == {"auc/chestmnist": 1, "acc/chestmnist": 1}
    assert metrics_of("medmnist", questions, [("", (1, 1))] * len(questions))["auc/chestmnist"] == 0.5


def test_an_npz_that_does_not_fit_is_named(tmp_path):
    np.savez(
        tmp_path / "breastmnist.npz", test_images=np.zeros((2, 28, 28), np.uint8), test_labels=np.array([[7], [5]])
    )
    with pytest.raises(UmedError, match=r"2 of 2 rows cannot be read") as caught:
        questions_of("medmnist", tmp_path)
    assert "breastmnist.npz:test_labels[1]: the label 5 is none of the 2 classes" in str(caught.value)
    np.savez(tmp_path / "breastmnist.npz", test_images=np.zeros((2, 28, 28), np.uint8), test_labels=np.zeros((2, 3)))
    with pytest.raises(UmedError, match=r"breastmnist.npz: labels \(2, 3\) of 2 images do not fit"):
        questions_of("medmnist", tmp_path)
    np.savez(tmp_path / "breastmnist.npz", train_images=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(UmedError, match="has no test_images, test_labels; it has train_images"):
        questions_of("medmnist", tmp_path)


@pytest.mark.parametrize("odd", [5, -1, 0.5, float("nan")])
def test_an_odd_label_of_medmnist_costs_its_image_alone(tmp_path, capsys, odd):
    """A label of -1 would be read as the last class."""
    labels = np.array([[0], [1], [odd], [1]], dtype=np.float32 if isinstance(odd, float) else np.int64)
    np.savez(tmp_path / "breastmnist.npz", test_images=np.zeros((4, 28, 28), np.uint8), test_labels=labels)
    asked = questions_of("medmnist", tmp_path)
    assert [question.truth for question in asked] == ["malignant", "normal or benign", "normal or benign"]
    assert [question.id for question in asked] == ["breastmnist/0", "breastmnist/1", "breastmnist/3"]
    assert "medmnist: 1 of 4 rows are left out" in capsys.readouterr().err
    several = np.zeros((4, 14), np.int64)
    several[3, 13] = odd if odd == -1 else 2
    np.savez(tmp_path / "chestmnist.npz", test_images=np.zeros((4, 28, 28), np.uint8), test_labels=several)
    assert sum(question.groups["part"] == "chestmnist" for question in questions_of("medmnist", tmp_path)) == 3 * 14


def breast(folder, name="breastmnist", labels=(0, 1, 1, 1), **changes):
    """``changes`` take the place of arrays."""
    folder.mkdir(exist_ok=True)
    arrays = {"test_images": np.zeros((len(labels), 28, 28), np.uint8), "test_labels": np.array(labels)[:, None]}
    np.savez(folder / f"{name}.npz", **{**arrays, **changes})
    return folder


def test_of_several_sizes_of_a_set_the_largest_is_asked(tmp_path, capsys):
    """By name, _64 comes behind _224. Files of others that begin like a set's are none of MedMNIST's."""
    for name in ("breastmnist", "breastmnist_64", "breastmnist_128", "breastmnist_224", "breastmnist_corrupted"):
        breast(tmp_path, name)
    assert {question.about["file"] for question in questions_of("medmnist", tmp_path)} == {
        str(tmp_path / "breastmnist_224.npz")
    }
    told = capsys.readouterr().err
    assert "breastmnist is there in 4 sizes; breastmnist_224.npz is asked" in told
    assert "breastmnist_224.npz has 4 test images, and the published file has 156" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"test_images": np.zeros((4, 28, 28), np.float32)},
            "test_images are float32 .4, 28, 28.; MedMNIST's are uint8",
        ),
        ({"test_images": np.zeros((4, 28, 28, 28), np.uint8)}, "test_images are uint8 .4, 28, 28, 28."),
        ({"test_images": np.zeros((3, 28, 28), np.uint8)}, "labels .4, 1. of 3 images do not fit"),
        ({"test_labels": np.array([["a"]] * 4, dtype=object)}, "cannot be read .*allow_pickle"),
    ],
)
def test_arrays_that_are_not_medmnists_are_refused(changes, words, tmp_path):
    with pytest.raises(UmedError, match=words):
        questions_of("medmnist", breast(tmp_path, **changes))


def test_a_cut_off_npz_and_volumes_are_told(tmp_path):
    whole = (breast(tmp_path) / "breastmnist.npz").read_bytes()
    for length in (len(whole) // 2, 20, 0):
        (tmp_path / "breastmnist.npz").write_bytes(whole[:length])
        with pytest.raises(UmedError, match="breastmnist.npz: cannot be read .*Was the download cut off"):
            questions_of("medmnist", tmp_path)
    (tmp_path / "breastmnist.npz").rename(tmp_path / "nodulemnist3d_64.npz")
    with pytest.raises(UmedError, match="nodulemnist3d_64.npz: volumes are not asked"):
        questions_of("medmnist", tmp_path)
