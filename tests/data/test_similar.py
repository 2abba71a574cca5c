"""Similar cases: the nearest studies equal NumPy's, and none gives the answer away."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from support.probing import studies

from umed_plugin.data import similar
from umed_plugin.data.augmentation.study import augmented_study
from umed_plugin.data.augmentation.texts import is_templated
from umed_plugin.data.leaks import thumbprint
from umed_plugin.data.records import record_geometry
from umed_plugin.data.similar import NOTHING, Bank, Case, case_of, make_bank, said_of, sentence, with_similar
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack


def noise(seed):
    return np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def bank(count=200, dimension=8, patients=None):
    generator = np.random.default_rng(1)
    features = generator.normal(size=(count, dimension)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cases = [Case(f"s{i}", f"{i}.png", None, patients(i) if patients else f"p{i}", f"d{i}") for i in range(count)]
    return Bank(cases, features, np.stack([thumbprint(noise(i)) for i in range(count)]).astype(np.float16))


def test_the_nearest_equal_a_plain_comparison():
    known = bank()
    for seed in range(20):
        feature = np.random.default_rng(100 + seed).normal(size=8).astype(np.float32)
        cosines = [float(row @ feature) / float(np.linalg.norm(feature)) for row in known.features]
        wanted = sorted(range(len(cosines)), key=lambda i: -cosines[i])
        for k in (1, 3, 100):
            found = known.nearest(
                Case("new", "new.png", None, "someone"), feature, thumbprint(noise(-seed % 7 + 900)), k
            )
            assert found == wanted[:k]


def test_the_study_itself_its_patient_and_its_copies_are_never_taken():
    known = bank(patients=lambda i: f"p{i // 2}")
    feature, print32 = known.features[10], thumbprint(noise(10))
    assert known.nearest(Case("", "other.png"), feature, thumbprint(noise(999)), 1) == [10]
    by_id = known.nearest(Case("s10", "moved.png"), feature, thumbprint(noise(999)), 200)
    assert 10 not in by_id and len(by_id) == 199
    by_patient = known.nearest(Case("new", "new.png", None, "p5"), feature, thumbprint(noise(999)), 200)
    assert not {10, 11} & set(by_patient) and len(by_patient) == 198
    assert 10 not in known.nearest(Case("", "10.png"), feature, thumbprint(noise(999)), 200)
    turned = thumbprint(np.ascontiguousarray(np.rot90(noise(10))[:, ::-1]))
    for copy in (print32, turned):
        assert 10 not in known.nearest(Case("new", "new.png"), feature, copy, 200), "a near-duplicate of another name"


def test_what_is_said_and_where():
    assert sentence(["nodule", "cyst and nodule", NOTHING]) == (
        "Similar studies, nearest first: nodule; cyst and nodule; no finding.\n"
    )
    record = studies(1, seed=3, negatives=0)[0]
    said = sentence(["cyst"])
    changed = with_similar(record, said)
    assert (
        changed["conversations"][0]["value"] == f"<image>\n{said}What?"
        and changed["conversations"][1:] == record["conversations"][1:]
    )
    assert with_similar(record, "") is record
    assert "[" not in said, "no boxes: they are another image's"


def test_the_diagnoses_of_records():
    records = studies(60, seed=2)
    found = {case_of(record, "f").diagnosis for record in records}
    assert NOTHING in found and "cyst" in found and any(" and " in text for text in found)
    assert (
        case_of(records[0], "f").path == f"f/{records[0]['image']}" and case_of(records[0], "f").patient == "drawn/p0"
    )


def test_an_augmented_study_keeps_what_is_said():
    record = studies(1, seed=3, negatives=0)[0]
    record["provenance"]["seed"] = 0
    record["conversations"] = write_conversation(record, record_geometry(record), random.Random(f"0:{record['id']}"))
    assert is_templated(record) and is_templated(with_similar(record, sentence(["cyst"])))


def test_other_studies_diagnoses_are_not_mirrored_with_the_image():
    """Nor do their words say where this study's lesions lie, or stop its movements."""
    rule = {"flips": ["left_right"], "rotation": 10, "zoom": [0.8, 1.5], "shift": 0.2, "share": 1}
    record = {**studies(1, seed=3, negatives=0)[0], "augment": rule}
    turns = [{"from": "human", "value": "<image>\nOn the left?"}, {"from": "gpt", "value": "Yes."}]
    for diagnosis in ("left atrial enlargement", "RML nodule", "a cyst at [0.1, 0.2, 0.3, 0.4]"):
        said = sentence([diagnosis, NOTHING])
        for asked, mirrored in (("On the left?", "On the right?"), ("What is it?", "What is it?")):
            turns[0]["value"] = f"<image>\n{asked}"
            plain = {**record, "conversations": turns}
            mirrorings = 0
            for epoch in range(12):
                alone, beside = (augmented_study(one, 0, epoch) for one in (plain, with_similar(plain, said)))
                assert alone.move == beside.move
                question = beside.record["conversations"][0]["value"]
                assert question == f"<image>\n{said}{mirrored if beside.move.mirrors else asked}"
                mirrorings += beside.move.mirrors
            assert mirrorings > 3


@pytest.fixture
def drawn(tmp_path):
    records = studies(12, split="train", negatives=0)
    for number, record in enumerate(records):
        Image.fromarray(noise(number)).save(tmp_path / record["image"])
    return records


class Tower:
    """The mean grey level of each channel; counts the images that it sees."""

    def __init__(self):
        self.seen = 0

    def __call__(self, cases):
        self.seen += len(cases)
        return np.stack([np.asarray(Image.open(case.path), np.float32).mean((0, 1)) - 127 for case in cases])


def test_features_are_kept_until_something_changes(drawn, tmp_path):
    tower, kept = Tower(), tmp_path / "kept" / "bank.npz"
    probe = {**drawn[0], "id": "p", "answer_type": "probe"}
    first = make_bank([*drawn, probe, {**drawn[0], "split": "test"}], tmp_path, tower, kept=kept, tower="a")
    assert len(first.cases) == 12 == tower.seen
    again = make_bank(drawn, tmp_path, tower, kept=kept, tower="a")
    assert tower.seen == 12 and np.array_equal(first.features, again.features)
    make_bank(drawn, tmp_path, tower, kept=kept, tower="b")
    assert tower.seen == 24, "another tower"
    kept.write_bytes(b"damaged")
    make_bank(drawn, tmp_path, tower, kept=kept, tower="b")
    assert tower.seen == 36


def test_each_image_is_encoded_once_and_those_without_neighbours_are_counted(drawn, tmp_path, capsys):
    tower = Tower()
    known = make_bank(drawn, tmp_path, tower)
    cases = [case_of(record, tmp_path) for record in drawn for _ in range(3)]
    said = said_of(cases, known, tower, 2)
    assert tower.seen == 24 and all(text.count(";") == 1 for text in said) and said[0] == said[1]
    alone = make_bank(drawn[:1], tmp_path, tower)
    assert said_of([case_of(drawn[0], tmp_path)], alone, tower, 2) == [""]
    assert "1 of 1 questions have no similar case" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(drawn, tmp_path):
    with pytest.raises(UmedError, match="no study of the split train"):
        make_bank([{**record, "split": "test"} for record in drawn], tmp_path, Tower())
    with pytest.raises(UmedError, match=r"drawn-train0.png: the tower's features are not finite, or all 0"):
        make_bank(drawn, tmp_path, lambda cases: np.zeros((len(cases), 3)))
    assert similar.NOTHING == "no finding"
