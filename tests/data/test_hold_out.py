"""`hold_out`: classes and sources in the test alone, and what an evaluation says of them."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe import GIVEN_BOX, RECIPE, record_questions
from umed_plugin.evaluation.evaluation_run import predicted
from umed_plugin.evaluation.metrics.metric import measure
from umed_plugin.evaluation.results import Evaluation, compare
from umed_plugin.grounding.dialects import find_dialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

pytestmark = pytest.mark.one_stack


def recipe_with(folder, rule: str):
    text = shipped_recipes()["demo_studies"].read_text()
    (folder / "held.yaml").write_text(f"{text}\nhold_out: {rule}\n")
    return load_recipe(folder / "held.yaml")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    make_studies(folder, seed=0, train=40, val=8, test=20)
    return folder


def shown(items) -> dict[str, Counter]:
    found = {}
    for item in items:
        found.setdefault(item.split, Counter()).update(set(item.classes) or {"none"})
    return found


def test_a_held_out_class_is_in_the_test_alone_which_stays_the_same(studies, tmp_path):
    plain = read_annotations(load_recipe("demo_studies"), studies)
    held = read_annotations(recipe_with(tmp_path, "{classes: [effusion]}"), studies)
    before, after = shown(plain.items), shown(held.items)
    assert before["train"]["effusion"] and before["val"]["effusion"]
    assert "effusion" not in after["train"] and "effusion" not in after["val"] and after["test"] == before["test"]
    with_it = {
        split: sum("effusion" in i.classes for i in plain.items if i.split == split) for split in ("train", "val")
    }
    assert held.left_out == {f"held out of {split}: effusion": count for split, count in with_it.items()}
    assert len(held.items) == len(plain.items) - sum(with_it.values()), (
        "a second lesion beside it does not keep an image"
    )
    assert {i.image for i in held.items if i.held_out} == {
        i.image for i in plain.items if i.split == "test" and "effusion" in i.classes
    }


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{classes: [efusion]}", "hold_out.classes: unknown class 'efusion'.*'effusion'"),
        ("{sources: [demo]}", "hold_out.sources: has a meaning only in a mixture"),
        ("{}", "names neither classes nor sources"),
        ("{class: [effusion]}", "hold_out.class"),
    ],
)
def test_what_a_recipe_cannot_hold_out(rule, words, tmp_path):
    with pytest.raises(UmedError, match=f"(?s){words}"):
        recipe_with(tmp_path, rule)


def test_a_class_that_the_test_does_not_show_cannot_be_held_out(tmp_path):
    make_studies(tmp_path / "s", seed=0, train=8, val=0, test=1)
    everything = "{classes: [nodule, cyst, calcification, effusion]}"
    found = read_annotations(recipe_with(tmp_path, everything), tmp_path / "s")
    told = " ".join(found.faults.messages)
    assert "has no image in the split test, so holding it out would test nothing" in told
    assert "hold_out: leaves no image in the split train. Hold out less" in told


def mixture_of(folder, rule: str):
    """Two sources of generated studies, `first.yaml` and `second.yaml`, under ``folder``."""
    for seed, name in enumerate(("first", "second")):
        make_studies(folder / name, seed=seed, train=8, val=4, test=4)
        text = shipped_recipes()["demo_studies"].read_text().replace("name: demo_studies", f"name: {name}", 1)
        (folder / f"{name}.yaml").write_text(text)
    sources = "{first.yaml: {folder: first}, second.yaml: {folder: second}}"
    file = folder / "both.yaml"
    file.write_text(f"name: both\ndescription: Both.\nsources: {sources}\nsize: 32\nhold_out: {rule}\n")
    return load_recipe(file)


def test_a_held_out_source_of_a_mixture(tmp_path):
    found = read_annotations(mixture_of(tmp_path, "{sources: [second.yaml]}"), tmp_path)
    splits = Counter((item.recipe.name, item.split, item.held_out) for item in found.items)
    assert set(splits) == {*(("first", split, False) for split in ("train", "val", "test")), ("second", "test", True)}
    assert {reason.partition(": ")[2] for reason in found.left_out if "held out" in reason} == {"second.yaml"}
    with pytest.raises(UmedError, match=r"(?s)hold_out.sources: unknown source 'secnd.yaml'.*'second.yaml'"):
        mixture_of(tmp_path, "{sources: [secnd.yaml]}")
    text = (tmp_path / "first.yaml").read_text()
    (tmp_path / "first.yaml").write_text(f"{text}\nhold_out: {{classes: [cyst]}}\n")
    with pytest.raises(UmedError, match="has a hold_out of its own"):
        load_recipe(tmp_path / "both.yaml")


def evaluated(benchmark, questions, answer):
    questions = benchmark.adapt(questions, Scorer())
    rows = [predicted(benchmark, q, ModelAnswer(answer(q), []), Scorer()).row() for q in questions]
    return questions, {name: found["value"] for name, found in measure(benchmark.metrics(rows), rows).items()}


@pytest.mark.llava
def test_an_evaluation_says_what_training_could_not_see(studies, tmp_path):
    records = build_records(
        recipe_with(tmp_path, "{classes: [effusion]}"), out_dir=tmp_path, data_root=studies, split="test"
    )
    assert {"held_out" in record for record in records} == {True, False}
    _, found = evaluated(
        RECIPE, record_questions(records), lambda q: "nodule" if "held_out" in q.about["record"] else q.truth
    )
    assert found["held_out_accuracy"] == 0 and found["seen_accuracy"] == 1 and found["seen_mean_iou"] > 0.9
    plain = [{key: value for key, value in record.items() if key != "held_out"} for record in records]
    _, without = evaluated(RECIPE, record_questions(plain), lambda q: q.truth)
    assert not {name for name in without if "held_out" in name or "seen" in name}


@pytest.mark.llava
@pytest.mark.parametrize("held_first", [True, False])
def test_a_run_with_the_key_is_compared_with_one_without_it_in_both_groups(studies, tmp_path, held_first):
    recipe = recipe_with(tmp_path, "{classes: [effusion]}")
    held = build_records(recipe, out_dir=tmp_path, data_root=studies, split="test")
    plain = [{key: value for key, value in record.items() if key != "held_out"} for record in held]

    def evaluation(records, says):
        questions = RECIPE.adapt(record_questions(records), Scorer())
        answers = [predicted(RECIPE, q, ModelAnswer(says(q), []), Scorer()) for q in questions]
        return Evaluation("recipe", "c", "t", answers, {})

    names = {record["id"] for record in held if "held_out" in record}
    # Without the key a model knows the class. With it, it takes all of these studies for nodules.
    before = evaluation(plain, lambda q: q.truth)
    after = evaluation(held, lambda q: "nodule" if q.id in names else q.truth)
    found = compare(after, before) if held_first else compare(before, after)
    assert found["held_out_accuracy"]["difference"] == (1 if held_first else -1)
    assert found["held_out_accuracy"]["n"] == len(names) and found["seen_accuracy"]["n"] == len(held) - len(names)
    assert found["seen_accuracy"]["difference"] == 0
    assert not {name for name in compare(before, before) if "held_out" in name}


@pytest.mark.llava
def test_with_the_box_in_the_question_the_diagnosis_alone_is_judged(studies, tmp_path):
    records = build_records(load_recipe("demo_studies"), out_dir=tmp_path, data_root=studies, split="test")
    asked, found = evaluated(GIVEN_BOX, record_questions(records), lambda q: q.truth)
    with_lesion = [record for record in records if record["objects"]["bbox"]]
    assert [question.id for question in asked] == [record["id"] for record in with_lesion] and len(asked) < len(records)
    for question, record in zip(asked, with_lesion):
        several = len(record["objects"]["bbox"]) > 1
        assert ("The abnormal regions are at [" if several else "The abnormal region is at [") in question.text
        assert all(box in question.truth for box in question.text.rpartition(" at ")[2].rstrip(".").split("], ")[:1])
    assert found == {"accuracy": 1.0}
    fine = build_records(load_recipe("demo_studies"), out_dir=tmp_path, data_root=studies, split="test", box_decimals=3)
    for question in GIVEN_BOX.adapt(record_questions(fine), Scorer()):
        given = question.text.rpartition(" at ")[2].rstrip(".")
        assert re.fullmatch(r"(\[(\d\.\d{3}, ){3}\d\.\d{3}\](, )?)+", given), given
        assert all(box in question.truth for box in given.split("], ")[:1])
    (no_decimals, *_) = [record for record in fine if record["objects"]["bbox"]]
    no_decimals["provenance"]["box_decimals"] = "3"
    with pytest.raises(UmedError, match="box_decimals is '3'; needed: 2 or 3"):
        GIVEN_BOX.adapt(record_questions(fine), Scorer())
    with pytest.raises(UmedError, match="none of the studies has a lesion"):
        GIVEN_BOX.adapt(record_questions([r for r in records if not r["objects"]["bbox"]]), Scorer())
    with pytest.raises(UmedError, match="--give-box gives boxes in LLaVA's form"):
        GIVEN_BOX.adapt(record_questions(records), Scorer(dialect=find_dialect("qwen_vl")))
