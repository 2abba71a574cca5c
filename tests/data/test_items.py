"""Items that LLaVA cannot train on are refused by file, index and field; what it would pass over in silence is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from umed_plugin.data.items import check_items
from umed_plugin.data.records import load_records
from umed_plugin.errors import UmedError

ASKED = {"from": "human", "value": "<image>\nIs there anything abnormal?"}
ANSWERED = {"from": "gpt", "value": "There is one abnormal area at [0.10, 0.20, 0.35, 0.40]. It is a nodule."}
MISTRAL = ("</s>", "[INST]", "[/INST]")


def good(count: int = 4) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "image": f"{i}.png", "conversations": [ASKED, ANSWERED]} for i in range(count)]


def turns(*said: Any) -> dict[str, Any]:
    pairs = [{"from": role, "value": value} for role, value in said]
    return {"id": "r9", "image": "1.png", "conversations": pairs}


Q, A = "<image>\nAnything?", "A nodule."

REFUSED = {
    "two images": ({"id": "r9", "image": ["1.png", "2.png"], "conversations": [ASKED, ANSWERED]}, "names 2 images"),
    "image is a number": ({"id": "r9", "image": 7, "conversations": [ASKED, ANSWERED]}, "'image' is 7"),
    "image is an object": (
        {"id": "r9", "image": {"path": "1.png"}, "conversations": [ASKED, ANSWERED]},
        "an object of 1",
    ),
    "empty path": ({"id": "r9", "image": "", "conversations": [ASKED, ANSWERED]}, "'image' is an empty text"),
    "other roles": (turns(("user", Q), ("assistant", A)), "turns are from 'assistant', 'user'"),
    "system": (turns(("system", "You are a radiologist."), ("human", Q), ("gpt", A)), "set by --version"),
    "no role": ({"id": "r9", "conversations": [{"value": "What?"}, ANSWERED]}, "turns are from missing or null"),
    "tag in an answer": (
        turns(("human", Q), ("gpt", "In the <image> there is a nodule.")),
        "is an answer with <image>",
    ),
    "two tags": (
        turns(("human", Q), ("gpt", A), ("human", "<image>\nWhere?"), ("gpt", "Left.")),
        "2 turns hold <image>",
    ),
    "two tags in a turn": (turns(("human", "Compare <image> and <image>."), ("gpt", A)), "holds <image> 2 times"),
    "half a character": (turns(("human", Q), ("gpt", "A nodule \ud83d.")), "holds half a character"),
    "turns under another key": ({"id": "r9", "messages": [ASKED, ANSWERED]}, "The item has 'messages'"),
    "null answer": (turns(("human", Q), ("gpt", None)), "conversations[1]: 'value' is missing or null"),
    "answer is a list": (turns(("human", Q), ("gpt", [A])), "'value' is a list of 1"),
    "answer is a number": (turns(("human", Q), ("gpt", 3)), "'value' is 3"),
    "empty answer": (turns(("human", Q), ("gpt", "  ")), "is an empty answer"),
    "no answer": (turns(("human", Q)), "has no answer"),
    "no question": (turns(("gpt", A)), "beginning with human"),
    "twice the same": (turns(("human", Q), ("human", "Where?"), ("gpt", A)), "conversations[1] is from 'human'"),
    "no turns": ({"id": "r9", "image": "1.png", "conversations": []}, "a list of 0"),
    "turns are a text": ({"id": "r9", "image": "1.png", "conversations": "hi"}, "'conversations' is 'hi'"),
    "turns are null": ({"id": "r9", "image": "1.png", "conversations": None}, "missing or null"),
    "a turn is a text": ({"id": "r9", "image": "1.png", "conversations": [ASKED, "yes"]}, "conversations[1]: is 'yes'"),
    "no object": ("r9", "an item is an object"),
    "end token": (turns(("human", Q), ("gpt", "A nodule.</s>")), "holds '</s>'"),
    "instruction tag": (turns(("human", "<image>\n[INST] What?"), ("gpt", A)), "holds '[INST]'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_item_is_named_before_anything_is_loaded(case: str) -> None:
    item, found = REFUSED[case]
    items = [*good(7), item, *good(200)]
    with pytest.raises(UmedError) as caught:
        check_items(items, "train.json", MISTRAL)
    assert "train.json: 1 of 208 items" in str(caught.value)
    line = next(line for line in str(caught.value).splitlines() if line.startswith("  - [7]"))
    assert found in line
    assert ("(id r9)" in line) == isinstance(item, dict)


def test_all_faults_come_at_once_and_are_capped() -> None:
    items = [turns(("human", Q), ("gpt", None)) for _ in range(30)]
    with pytest.raises(UmedError, match="30 of 30 items") as caught:
        check_items(items, "train.json")
    assert str(caught.value).count("  - [") == 10
    assert "and 20 more faults" in str(caught.value)


def test_what_has_one_meaning_is_taken_as_meant(capsys: pytest.CaptureFixture[str]) -> None:
    text_only = {"id": "t", "image": None, "conversations": [{"from": "human", "value": "What is a nodule?"}, ANSWERED]}
    one = {"id": "l", "image": ["1.png"], "conversations": [ASKED, ANSWERED]}
    loose = turns(("gpt", "Hello."), ("human", Q), ("gpt", A), ("human", "Where?"))
    checked = check_items([*good(), text_only, one, loose], "train.json")
    assert "image" not in checked[4]
    assert checked[5]["image"] == "1.png"
    assert [turn["value"] for turn in checked[6]["conversations"]] == [Q, A]
    assert checked[:4] == good()
    said = capsys.readouterr().err
    assert "in 1 of 7 items ([6])" in said
    assert said.count("warning") == 1


UNSEEN = {
    "image without a tag": (
        turns(("human", "Is there anything abnormal?"), ("gpt", A)),
        "1 of 5 items with an image ([4])",
    ),
    "tag without an image": ({"id": "r9", "conversations": [ASKED, ANSWERED]}, "1 of 5 items ([4]) have <image>"),
    "another key": ({"id": "r9", "images": ["1.png"], "conversations": [ASKED, ANSWERED]}, "They have 'images'"),
    "video": (
        {"id": "r9", "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nAnything?"}, ANSWERED]},
        "1 items ([4]) have a video",
    ),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_an_image_that_the_model_never_sees_is_counted(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    item, said = UNSEEN[case]
    assert check_items([*good(), item], "train.json")[4] == item
    assert said in capsys.readouterr().err


def test_a_file_without_any_seen_image_is_refused() -> None:
    blind = [{**item, "conversations": [{"from": "human", "value": "Anything?"}, ANSWERED]} for item in good()]
    with pytest.raises(UmedError, match=r"no item with an image \(4, \[0\], \[1\], \[2\] and 1 more\) has <image>"):
        check_items(blind, "train.json")


@pytest.mark.parametrize(
    "tag", ["<Image>", "<img>", "<image/>", "[image]", "[IMG]", "<|image_1|>", "{image}", "<im_start>", "<ImageHere>"]
)
def test_a_tag_in_another_spelling_is_named(tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = turns(("human", f"{tag}\nAnything?"), ("gpt", A))
    check_items([*good(), other], "train.json")
    said = capsys.readouterr().err
    assert f"1 of 5 items ([4]) hold '{tag}'" in said
    assert "1 of 5 items with an image ([4]) have no <image>" in said
    with pytest.raises(UmedError, match="They have ") as caught:
        check_items([other] * 3, "train.json")
    assert f"They have '{tag}'" in str(caught.value)


def test_words_about_images_are_no_tags(capsys: pytest.CaptureFixture[str]) -> None:
    said = "<image>\nIs the image [a CT image] or an {MR} image, <b>this</b> one?"
    check_items([turns(("human", said), ("gpt", A))], "train.json")
    assert capsys.readouterr().err == ""


def test_plain_items_are_told_once_where_true_boxes_are_needed(tmp_path: Any) -> None:
    file = tmp_path / "plain.json"
    file.write_text(json.dumps(good(200)))
    with pytest.raises(UmedError) as caught:
        load_records(file)
    assert len(str(caught.value).splitlines()) == 1
    assert "200 of 200 items" in str(caught.value)
