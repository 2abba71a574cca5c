"""Rewards and records that ask for less than a diagnosis: what does not apply is None, and said before the first step."""

from __future__ import annotations

import pytest

from umed_plugin.data import template_writer
from umed_plugin.errors import UmedError
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.rewards import REWARDS, remarks_on_records, run_rewards
from umed_plugin.rewards.judges.lexical import LOCAL_JUDGES

PHRASE = {
    "answer_type": "phrase",
    "phrase": "small cyst",
    "objects": {"ref": ["cyst"], "bbox": [[0, 0, 50, 50]]},
    "terms": {"cyst": ["cyst"]},
    "conversations": [{"value": "Where is this: small cyst?"}, {"value": "[0.00, 0.00, 0.50, 0.50]"}],
}
REPORT = {
    "answer_type": "report",
    "objects": {"ref": ["cyst"], "bbox": []},
    "terms": {"cyst": ["cyst"]},
    "conversations": [{"value": "Write the report."}, {"value": "A cyst is seen."}],
}
GROUNDED = {**PHRASE, "answer_type": "grounded"}
BOX = "[0.00, 0.00, 0.50, 0.50]"


def values(record, text, share=0.5):
    rewards = {
        name: REWARDS.get(name)
        for name in ("relevance", "localization", "localization_diou", "vision_relevance", "format", "consistency")
    }
    columns = {"record": [record], "geometry": [ImageGeometry(100, 100)], "attention_on_lesion": [share]}
    return {name: column[0] for name, column in run_rewards(rewards, ["?"], [text], **columns).items()}


@pytest.mark.llava
def test_a_phrase_is_rewarded_for_its_boxes():
    assert values(PHRASE, BOX) == {
        **dict.fromkeys(("relevance", "vision_relevance", "format", "consistency")),
        "localization": 1.0,
        "localization_diou": 1.0,
    }
    assert values(PHRASE, f"The cyst: {BOX}")["vision_relevance"] == 0.5, "it repeats a word of the phrase"
    assert values(GROUNDED, BOX)["relevance"] is not None


@pytest.mark.llava
def test_a_report_is_rewarded_for_its_text():
    found = values(REPORT, "A cyst is seen.")
    assert found.pop("relevance") == 1.0 and set(found.values()) == {None}
    assert values(REPORT, "Clear.")["relevance"] == 0.0


@pytest.mark.llava
def test_records_without_any_reward_are_refused_and_others_said():
    localization = {"localization": REWARDS.get("localization")}
    both = {**localization, "relevance": REWARDS.get("relevance")}
    assert remarks_on_records(both, [GROUNDED] * 3) == []
    (told,) = remarks_on_records(both, [GROUNDED, PHRASE])
    assert told == "1 of 2 training records looked at are phrases; relevance does not apply to them."
    with pytest.raises(
        UmedError, match="1 of 2 .* reports, and none of the rewards .localization. applies to a report"
    ):
        remarks_on_records(localization, [GROUNDED, REPORT])


@pytest.mark.llava
def test_words_that_templates_drew_at_random_are_said():
    of_template = {**GROUNDED, "provenance": {"writer": template_writer.WRITER}}
    of_model = {**GROUNDED, "provenance": {"writer": "openai"}}
    lexical = {"relevance": LOCAL_JUDGES["lexical"]}
    (told,) = remarks_on_records(lexical, [of_template, of_template, of_model, {**GROUNDED, "provenance": None}])
    assert told.startswith("2 of 4 training records looked at") and "--umed_judge classes" in told
    assert remarks_on_records(lexical, [of_model]) == []
    assert remarks_on_records({"relevance": LOCAL_JUDGES["classes"]}, [of_template]) == []
    assert remarks_on_records({"localization": REWARDS.get("localization")}, [of_template]) == []
