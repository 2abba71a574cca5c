"""``--benchmark probes:RECIPE``: no answer that does not look scores above one half; the perfect one scores 1."""

from __future__ import annotations

import random
import shlex

import pytest
import yaml
from support.pages import DOCS, blocks, commands
from support.probing import NAMES, Follows, choices_of, studies, with_images

from umed_plugin.cli import main
from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.data.probes import KINDS
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import save_records
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.evaluation.benchmarks.probes import OF_RECIPE, probe_questions, stated_option
from umed_plugin.evaluation.benchmarks.recipe import record_questions
from umed_plugin.evaluation.evaluation_run import predicted
from umed_plugin.evaluation.evaluator import evaluate
from umed_plugin.evaluation.metrics.metric import statistics
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

pytestmark = pytest.mark.one_stack


def escape(text):
    return next((option for option in choices_of(text) if option.startswith(("not ans", "none of", "there is no"))), "")


def suggestion(text):
    return text.split("suggests ")[1].split(".")[0] if "suggests" in text else ""


def prior(text):
    """Blind to the image, but knows which class is frequent, and what it means if that one is not offered."""
    options = choices_of(text)
    if "On which side" in text:
        return "left"
    return NAMES[0] if NAMES[0] in options else escape(text) or options[0]


def contrary(text):
    """Blind to the image, and never takes a suggestion."""
    return next(option for option in choices_of(text) if option not in (suggestion(text), escape(text)))


BLIND = {
    "the first letter": lambda text: "A",
    "the last letter": lambda text: "ABCDE"[len(choices_of(text)) - 1],
    "always escapes": escape,
    "always the suggestion": suggestion,
    "class prior": prior,
    "contrary": contrary,
    "at random": lambda text: random.Random(text).choice(choices_of(text)),
}


def evaluated(records, rule):
    """Values of the metrics, and the questions."""
    questions = probe_questions(record_questions(records))
    benchmark, scorer = OF_RECIPE.benchmark, Scorer()
    rows = [
        predicted(benchmark, question, ModelAnswer(rule(question.text, question.image), []), scorer).row()
        for question in questions
    ]
    return statistics(benchmark.metrics(rows), rows), questions


@pytest.fixture(autouse=True)
def _short_bootstrap(monkeypatch):
    monkeypatch.setattr("umed_plugin.evaluation.metrics.metric.RESAMPLES", 20)


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize("weights", [None, (20, 1, 1, 1)], ids=["even", "skewed"])
def test_who_does_not_look_scores_one_half_at_most(name, weights):
    found, _ = evaluated(studies(80, weights=weights), lambda text, image: BLIND[name](text))
    assert found["balanced_accuracy"] <= 0.5
    for kind in KINDS:
        assert found[f"balanced_accuracy/{kind}"] <= 0.5, kind


def test_who_looks_scores_1_and_refusals_and_suggestions_are_counted():
    records = studies(80)
    questions = {
        (question.text, question.image): question.truth for question in probe_questions(record_questions(records))
    }
    found, asked = evaluated(records, lambda text, image: questions[text, image])
    for kind in KINDS:
        assert found[f"balanced_accuracy/{kind}"] == 1
    assert found["takes_suggestion/wrong"] == 0 and found["takes_suggestion/right"] == 1
    assert found["escapes/removed_option"] == 0.5 and "escapes/suggestion" not in found
    found, _ = evaluated(records, lambda text, image: escape(text))
    assert found["escapes/wrong_image"] == 1 and found["accuracy/wrong_image/control"] == 0
    found, _ = evaluated(records, lambda text, image: suggestion(text))
    assert found["takes_suggestion/wrong"] == 1
    assert {question.patient for question in asked if question.patient}, "intervals resample patients"


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("B", 1),
        ("none of these", 2),
        ("It is a cyst.", 1),
        ("Yes, one abnormal area, consistent with nodule.", 0),
        ("a nodule or a cyst", None),
        ("", None),
        ("C: none of these.", 2),
    ],
)
def test_which_option_an_answer_stands_for(answer, chosen):
    assert stated_option(answer, ["nodule", "cyst", "none of these"]) == chosen


def test_an_option_within_another_one():
    options = ["left", "right", "there is no nodule on the left"]
    assert stated_option("there is no nodule on the left", options) == 2
    assert stated_option("On the left.", options) == 0


def test_the_whole_way_by_file_with_limit_and_comparison(tmp_path, capsys):
    save_records(with_images(tmp_path, studies(40)), tmp_path / "records.json")
    name = f"probes:{tmp_path / 'records.json'}"
    first = evaluate(Follows(lambda text, image: "A"), name, out=tmp_path / "a", limit=10)
    assert len(first.predictions) == 40 and first.benchmark == "probes"
    again = evaluate(Follows(lambda text, image: "A"), name, out=tmp_path / "b", limit=10)
    assert (tmp_path / "a" / "predictions.jsonl").read_bytes() == (tmp_path / "b" / "predictions.jsonl").read_bytes()
    from umed_plugin import compare

    assert compare(Evaluation.load(tmp_path / "a"), again)["balanced_accuracy"]["difference"] == 0


def test_names_that_are_wrong_and_records_without_probes_are_told(tmp_path):
    with pytest.raises(UsageError, match=r"unknown recipe 'brain_tumour_coco'.*brain_tumor_coco"):
        evaluate(Follows(str), "probes:brain_tumour_coco")
    with pytest.raises(UsageError, match="probes:RECIPE"):
        evaluate(Follows(str), "probse")
    save_records(with_images(tmp_path, studies(5, names=("polyp",), negatives=0)), tmp_path / "records.json")
    with pytest.raises(UmedError, match=r"(?s)allow no probe:.*no probes of the kind wrong_image"):
        evaluate(Follows(str), f"probes:{tmp_path / 'records.json'}")
    # Of records, images lie beside the file: a folder for them would be passed over.
    for name in ("", "probes:"):
        with pytest.raises(UsageError, match=r"--data-root no-such: has no effect on .*records.json.*Remove it"):
            evaluate(Follows(str), f"{name}{tmp_path / 'records.json'}", data_root="no-such")


def test_kinds_that_fall_out_are_said_and_the_others_asked(tmp_path, capsys):
    found, _ = evaluated(studies(30, names=("polyp",)), lambda text, image: "A")
    assert "balanced_accuracy/wrong_image" in found and "balanced_accuracy/suggestion" not in found
    assert "no probes of the kind suggestion" in capsys.readouterr().err


@pytest.mark.run
def test_the_command_of_the_page(tiny_mistral, tmp_path, monkeypatch):
    """As it stands, on the demo's studies and a small checkpoint; and the YAML of the page."""
    (command,) = [command for command in commands(DOCS / "evaluation.md") if "probes:" in command]
    monkeypatch.chdir(tmp_path)
    make_studies(tmp_path / "runs/demo/data/studies", train=0, val=0, test=24)
    words = shlex.split(command.replace("runs/demo/checkpoint/llava-mistral-umed", str(tiny_mistral)))
    assert main([*words[1:], "--limit", "2", "--max-new-tokens", "4"]) == 0
    assert Evaluation.load(tmp_path / "probes").metrics["balanced_accuracy"]["n"] == 8
    recipe = load_recipe("demo_studies")
    for block in blocks(DOCS / "evaluation.md", "yaml"):
        assert recipe.model_validate({**recipe.model_dump(), **yaml.safe_load(block)})
