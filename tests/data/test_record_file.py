"""Records that are read when they are asked for are those of the file, and the check of all of them says what it always said."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umed_plugin.data import json_list, record_file
from umed_plugin.data.items import check_items
from umed_plugin.data.record_file import JoinedRecords, RecordFile, kept_splits, open_records
from umed_plugin.data.records import load_records, not_records, save_records
from umed_plugin.errors import UmedError


def item(index: int, **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": f"A Zyste, größer: {index} 肺."},
    ]
    return {"id": f"é{index}", "image": f"{index}.png", "conversations": turns, **more}


def opened(path: Path, *, strict: bool = False) -> RecordFile:
    return open_records(
        path, "train.json", ["</s>"], strict=strict, failed=lambda error: UmedError(f"no list: {error}")
    )


@pytest.fixture
def items() -> list[dict[str, Any]]:
    found = [item(index, split=("train", "val")[index % 3 == 2]) for index in range(10)]
    del found[4]["image"]
    found[4]["conversations"][0]["value"] = "No image: what is a cyst?"
    found[5]["image"] = ["5.png"]
    found[6]["provenance"] = {"image_aspect_ratio": "square"}
    return found


@pytest.mark.parametrize("piece", [7, 2**22])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_record_is_read_from_its_place(
    tmp_path: Path, items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, piece: int, indent: Any, encoding: str
) -> None:
    monkeypatch.setattr(json_list, "_PIECE", piece)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding=encoding)
    for _ in range(2):  # indexed, and by the index that was kept
        records = opened(file)
        meant = check_items(items, "train.json")
        assert list(records) == meant and records[-1] == meant[9] and records[2:4] == meant[2:4]
        assert pickle.loads(pickle.dumps(records))[3] == meant[3]
        assert records.texts("split").tolist() == [entry["split"] for entry in items]
        assert records.texts("aspect").tolist() == [""] * 6 + ["square"] + [""] * 3
        assert records.column("has_image").tolist() == [index != 4 for index in range(10)]
        words = [sum(len(turn["value"].split()) for turn in entry["conversations"]) for entry in meant]
        assert records.column("words").tolist() == words
    with pytest.raises(IndexError):
        records[10]


def test_the_index_knows_which_records_have_boxes(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    """A labelled study without a lesion has none, and a plain item has no label."""
    for item, boxes in zip(items, ([], [[1, 1, 9, 9]])):
        item.update(objects={"ref": ["cyst"] * len(boxes), "bbox": boxes}, terms={}, provenance={}, image="a.png")
    file = tmp_path / "train.json"
    file.write_text(json.dumps(items))
    for _ in range(2):
        records = opened(file)
        assert records.column("labelled").tolist()[:3] == [True, True, False]
        assert records.column("has_boxes").tolist() == [False, True, *[False] * 8]


def test_the_kept_index_answers_which_splits_there_are(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps(items))
    assert kept_splits(file) is None, "no start has kept one"
    opened(file)
    assert kept_splits(file) == {"train", "val"}, "the aspect ratio is no split"
    file.write_text(json.dumps([entry for entry in items if entry["split"] == "train"]))
    assert kept_splits(file) is None, "it is of another file"
    opened(file)
    assert kept_splits(file) == {"train"}
    kept = tmp_path / ".train.json.index.npz"
    with np.load(kept) as arrays:
        np.savez_compressed(kept, **{**arrays, "words": np.zeros(10**6, dtype=np.int64)})
    assert kept_splits(file) is None, "unpacked it is larger than its file"
    kept.write_bytes(b"PK")
    assert kept_splits(file) is None


def test_records_of_several_files_are_one_sequence(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    parts = []
    for name, some in (("a", items[:4]), ("b", []), ("c", items[4:])):
        (tmp_path / name).write_text(json.dumps(some))
        parts.append(opened(tmp_path / name))
    joined = JoinedRecords(parts)
    whole = check_items(items, "train.json")
    assert list(joined) == [joined[index] for index in range(10)] == whole and joined[-1] == whole[-1]
    train = joined.where(joined.texts("split") == "train")
    assert [record["id"] for record in train] == [entry["id"] for entry in items if entry["split"] == "train"]
    assert joined[np.int64(5)]["image"] == "5.png" and joined[1:3] == whole[1:3]
    assert len(JoinedRecords([])) == 0


BROKEN = [
    *("", "[", "]", "{}", "[1,]", "[1 2]", '[{"a": 1}', '[{"a": 1}] x', "[,1]", '{"a": [1]}', '"text"'),
    *("[" * 100_000, "[1]]", "[nul]"),
]


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_not_a_list_in_json_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "train.json"
    file.write_text(text)
    with pytest.raises((ValueError, RecursionError)):
        list(json_list.items_of(file))
    with pytest.raises(UmedError, match="no list"):
        opened(file)
    with pytest.raises(UmedError, match="not JSON|Expected: a list of records"):
        load_records(file)


@pytest.mark.parametrize("text", ["[]", " [ ] ", "[12, 345]", '[ "a" , null,\t[1] ]\n', "[1e5,-2.5]"])
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_lists_are_read_as_json_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, piece: int
) -> None:
    monkeypatch.setattr(json_list, "_PIECE", piece)
    file = tmp_path / "list.json"
    file.write_text(text)
    found = list(json_list.items_of(file))
    assert [placed.item for placed in found] == json.loads(text)
    assert [json.loads(text[placed.start : placed.start + placed.length]) for placed in found] == json.loads(text)


def test_a_key_that_appears_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([item(0)]).replace('"id"', '"id": 1, "id"'))
    assert len(list(json_list.items_of(file))) == 1
    for strict in (False, True):
        with pytest.raises(UmedError, match="no list: the key 'id' appears twice"):
            opened(file, strict=strict)
    assert "the key 'id' appears twice" in str(not_records(file, ValueError("?")))


def test_faults_and_warnings_are_those_of_the_check_at_every_start(
    tmp_path: Path, items: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    items[3]["conversations"][0]["value"] = "No tag."
    items[7]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    check_items(items, "train.json")
    told = capsys.readouterr().err
    assert told.count("warning") == 2
    file = tmp_path / "train.json"
    file.write_text(json.dumps(items))
    for _ in range(2):
        opened(file)
        assert capsys.readouterr().err == told
    for entry in items:
        entry["conversations"][1:] = []
    with pytest.raises(UmedError) as expected:
        check_items(items, "train.json")
    file.write_text(json.dumps(items))
    for _ in range(2):
        with pytest.raises(UmedError) as raised:
            opened(file)
        assert str(raised.value) == str(expected.value) and "10 of 10 items" in str(raised.value)


@pytest.mark.parametrize("harm", ["cut", "other", "text", "folder", "older", "marks"])
def test_an_index_that_does_not_fit_is_made_again(
    tmp_path: Path, items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    file, index = tmp_path / "train.json", tmp_path / ".train.json.index.npz"
    file.write_text(json.dumps(items))
    opened(file)
    if harm == "cut":
        index.write_bytes(index.read_bytes()[:-100])
    elif harm == "other":
        items = items[::-1]
        file.write_text(json.dumps(items))
    elif harm == "text":
        index.write_text("nothing")
    elif harm == "folder":
        index.unlink()
        index.mkdir()
    elif harm == "older":
        monkeypatch.setattr(record_file, "_FORMAT", "index-1")
    made = []
    whole = record_file._made_index
    monkeypatch.setattr(record_file, "_made_index", lambda *args: made.append(1) or whole(*args))
    marks = ["</s>", "[/INST]"] if harm == "marks" else ["</s>"]
    records = open_records(file, "train.json", marks, strict=False, failed=lambda error: UmedError(str(error)))
    assert list(records) == check_items(items, "train.json") and made == [1]


def test_a_file_that_changes_while_it_is_used_is_not_misread(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps(items))
    records, begun = opened(file), opened(file)
    assert begun[0]["id"] == "é0"
    save_records(items[5:], file)
    assert begun[1]["id"] == "é1", "the old file is still open"
    with pytest.raises(UmedError, match="was changed while it was in use"):
        records[1]
    file.write_text(json.dumps(items))
    begun = opened(file)
    assert begun[0]
    os.truncate(file, 20)
    with pytest.raises(UmedError, match="was changed while it was in use"):
        begun[9]


def test_utf_16_is_read_whole_and_equal_terms_are_one_object(tmp_path: Path) -> None:
    terms = {"cyst": ["cyst"]}
    more = {"objects": {"ref": [], "bbox": []}, "image_size": [9, 9], "terms": terms, "answer_type": "negative"}
    records = [item(n, split="test", provenance={"image_aspect_ratio": "pad"}, **more) for n in range(3)]
    records[2]["split"] = "val"
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "r.json").write_text(json.dumps(records), encoding=encoding)
        loaded = load_records(tmp_path / "r.json")
        assert loaded == records and loaded[0]["terms"] is loaded[2]["terms"]
        assert load_records(tmp_path / "r.json", split="val") == records[2:]
