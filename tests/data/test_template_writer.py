"""What the writer may and may not say, and the templates against LLaVA's own."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from umed_plugin.checkpoints.prompt_templates import TEMPLATES, conversation_template, question_prompt
from umed_plugin.data.records import true_boxes
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.data.templates import NEGATIVES, PHRASINGS, QUESTIONS
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.grounding.boxes import parse_boxes, round_box
from umed_plugin.grounding.geometry import ImageGeometry

pytestmark = pytest.mark.one_stack
TERMS = {
    "nodule": ["nodule", "nodular opacity"],
    "pleural effusion": ["pleural effusion", "effusion"],
    "calcification": ["calcification"],
}


def record_with(*lesions: tuple[str, list[float]], terms: dict[str, list[str]] = TERMS) -> dict[str, Any]:
    objects = {"ref": [name for name, _ in lesions], "bbox": [box for _, box in lesions], "bbox_type": "real"}
    return {"id": "r", "objects": objects, "terms": terms}


GEOMETRY = ImageGeometry(300, 200)
ONE = record_with(("nodule", [30, 40, 80.5, 90]))
THREE = record_with(
    ("pleural effusion", [0, 10, 50, 60]), ("nodule", [100, 120, 160, 170]), ("nodule", [200, 150, 299, 199])
)
NONE = record_with()


def answers(record: dict[str, Any], count: int = 200, **options: Any) -> list[str]:
    turns = [write_conversation(record, GEOMETRY, random.Random(i), **options) for i in range(count)]
    return [turn[1]["value"] for turn in turns]


def names_in(text: str) -> list[str]:
    """Names in order of appearance, longest first so that "effusion" is not seen in "pleural effusion"."""
    words = sorted({word for names in TERMS.values() for word in names}, key=len, reverse=True)
    return re.findall("|".join(words), text, re.IGNORECASE)


@pytest.mark.parametrize("record", [ONE, THREE])
@pytest.mark.parametrize("decimals", [2, 3])
def test_every_answer_gives_every_box_and_then_its_name_once(record: dict[str, Any], decimals: int) -> None:
    boxes01 = GEOMETRY.to_square(true_boxes(record))
    for answer in answers(record, decimals=decimals):
        assert parse_boxes(answer) == [round_box(box, decimals) for box in boxes01], answer
        assert names_in(answer) == record["objects"]["ref"], answer
        events = re.findall(r"\[|" + "|".join(TERMS), answer)
        assert events[::2] == ["["] * len(boxes01), "a name stands before its box: " + answer
        assert events[1::2] == record["objects"]["ref"], answer


def test_answers_say_how_many() -> None:
    assert all(re.search(r"\bthree\b", answer) for answer in answers(THREE))
    assert all(re.search(r"\b(one|single|an)\b", answer, re.IGNORECASE) for answer in answers(ONE))


def test_answers_about_one_lesion_are_short() -> None:
    for answer in answers(ONE):
        assert 12 <= len(re.sub(r"\[.*?\]", "", answer).split()) <= 27, answer


def test_negatives_hold_no_name_and_no_box() -> None:
    seen = set(answers(NONE))
    assert seen == set(NEGATIVES)
    assert not any(names_in(answer) or parse_boxes(answer) for answer in seen)
    assert len(seen) >= 4


def test_wording_varies() -> None:
    questions = {write_conversation(ONE, GEOMETRY, random.Random(i))[0]["value"] for i in range(200)}
    assert questions == {f"<image>\n{question}" for question in QUESTIONS}
    assert len(questions) >= 6
    assert len({answer.split("[")[0] for answer in answers(ONE)}) == len(PHRASINGS) >= 4


def test_the_same_seed_writes_the_same() -> None:
    first, second = (write_conversation(THREE, GEOMETRY, random.Random("7:r")) for _ in range(2))
    assert first == second
    assert [turn["from"] for turn in first] == ["human", "gpt"]


def test_regions_are_told_in_the_square_that_the_model_sees() -> None:
    """A box at the very top of a 300 x 100 image lies in the middle of the padded square."""
    wide = ImageGeometry(300, 100)
    record = record_with(("nodule", [0, 0, 40, 20]))
    told = [write_conversation(record, wide, random.Random(i))[1]["value"] for i in range(20)]
    assert all("left centre" in text and "upper" not in text for text in told)
    tall = record_with(("nodule", [260, 180, 300, 200]))
    assert all("lower right" in text for text in answers(tall, 10))


def test_frames_never_hold_a_name_of_the_source() -> None:
    """A source whose synonyms are "finding" and "abnormal area" is only asked and answered with the other wordings."""
    terms = {"nodule": ["nodule", "finding", "abnormal area", "findings"]}
    for record in (record_with(("nodule", [30, 40, 80, 90]), terms=terms), record_with(terms=terms)):
        for i in range(100):
            question, answer = (turn["value"] for turn in write_conversation(record, GEOMETRY, random.Random(i)))
            assert not re.search(r"\b(finding|abnormal area)s?\b", question + answer, re.IGNORECASE)


def test_frames_hold_no_name_that_ends_in_a_parenthesis_and_no_plural(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = ("Is it TB (old)?", "Are there spots?", "What is it?")
    monkeypatch.setattr("umed_plugin.data.template_writer.QUESTIONS", frames)
    record = record_with(terms={"TB (old)": ["TB (old)"], "spot": ["spot"]})
    asked = {write_conversation(record, GEOMETRY, random.Random(i))[0]["value"] for i in range(30)}
    assert asked == {"<image>\nWhat is it?"}


def test_a_name_in_every_wording_is_an_error() -> None:
    with pytest.raises(UmedError, match="every template of the writer contains one of the source's names"):
        write_conversation(record_with(terms={"x": ["image", "is", "no"]}), GEOMETRY, random.Random(0))


def test_many_lesions() -> None:
    lesions = [("nodule", [10.0 * i, 10, 10.0 * i + 8, 20]) for i in range(23)]
    answer = answers(record_with(*lesions), 1)[0]
    assert "23" in answer
    assert "tenth" in answer
    assert "11th" in answer
    assert "22nd" in answer
    assert len(parse_boxes(answer)) == 23


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_stock_but_for_the_system_text(name: str) -> None:
    from llava.conversation import conv_templates

    ours, stock = vars(conversation_template(name)), vars(conv_templates[TEMPLATES[name].stock])
    assert ours.pop("system") == TEMPLATES[name].system != stock["system"]
    assert {**ours, "messages": list(ours["messages"])} == {
        **{key: value for key, value in stock.items() if key != "system"},
        "messages": list(stock["messages"]),
    }
    assert 5 <= len(TEMPLATES[name].system.split()) <= 20


@pytest.mark.parametrize("name", ["llava_v1", "mistral_instruct"])
def test_prompts_of_stock_templates_are_llavas_own(name: str) -> None:
    from llava.conversation import conv_templates

    conversation = conv_templates[name].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    assert question_prompt("What is it?", name) == conversation.get_prompt()
    assert question_prompt("<image>\nWhat is it?", name) == conversation.get_prompt()


@pytest.mark.llava
def test_our_prompts() -> None:
    system = TEMPLATES["umed_v1"].system
    assert question_prompt("Q?", "umed_v1") == f"{system} USER: <image>\nQ? ASSISTANT:"
    assert question_prompt("Q?", "umed_mistral") == f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n<image>\nQ? [/INST]"


def test_prompts_leave_llavas_templates_alone() -> None:
    from llava.conversation import conv_templates

    question_prompt("Q?", "umed_v1")
    assert list(conv_templates["llava_v1"].messages) == []
    assert conv_templates["llava_v1"].system.startswith("A chat between")


@pytest.mark.llava
def test_unknown_template() -> None:
    with pytest.raises(UsageError, match="Did you mean 'umed_mistral'"):
        question_prompt("Q?", "umed_mistrall")
