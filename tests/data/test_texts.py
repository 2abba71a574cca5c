"""Text files of others: marks, encodings, nesting, duplicate keys, and that all that is wrong is one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import load_records
from umed_plugin.data.texts import read_json, read_rows, read_text, read_xml, read_yaml
from umed_plugin.errors import UmedError

Read = Callable[[Path], Any]
BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>'


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (read_json, '{"a": [1]}', {"a": [1]}),
        (read_yaml, "a: [1]", {"a": [1]}),
        (read_rows, "a,b\n1,2\n", [["a", "b"], ["1", "2"]]),
        (lambda path: read_xml(path).findtext("b"), "<a><b>1</b></a>", "1"),
        (read_text, "0 0.5", "0 0.5"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_skipped(tmp_path: Path, read: Read, text: str, expected: Any, encoding: str) -> None:
    (tmp_path / "a").write_bytes(text.encode(encoding))
    assert read(tmp_path / "a") == expected


@pytest.mark.parametrize("encoding", ["GB2312", "iso-8859-1", "windows-1252", "UTF-8"])
def test_xml_in_the_encoding_that_it_declares(tmp_path: Path, encoding: str) -> None:
    name = "\u809d" if encoding in ("GB2312", "UTF-8") else "l\xe9sion"
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n<a><b>{name}</b></a>'
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert read_xml(tmp_path / "a.xml").findtext("b") == name


@pytest.mark.parametrize(
    ("read", "content", "words"),
    [
        (read_json, "[" * 100_000, "nested too deeply"),
        (read_json, '{"a":' * 100_000, "nested too deeply"),
        (read_json, '{"a": 1, "b": {"c": 1, "c": 2}}', "not JSON: the key 'c' appears twice"),
        (read_json, "9" * 6000 + "x", "not JSON"),
        (read_json, b'{"a": "\xe4"}', ":1: byte 0xe4 is not UTF-8"),
        (read_yaml, "name: " + "[" * 20_000, "nested too deeply"),
        (read_yaml, "name: " + "{a: " * 20_000, "nested too deeply"),
        (read_yaml, "- " * 20_000, "nested too deeply"),
        (read_yaml, "a: 2024-99-99", "not valid YAML"),
        (read_yaml, "a: 1\na: 2", "the key 'a' appears twice"),
        (read_yaml, "a: !!python/object/apply:os.mkdir [x]", "not valid YAML"),
        (read_yaml, b"a: \xff\xfe\x00", "not valid YAML"),
        (read_xml, BOMB, "declares XML entities"),
        (read_xml, BOMB.encode("utf-16"), "declares XML entities"),
        (read_xml, "<a>" * 100_000 + "</a>" * 100_000, "nested too deeply"),
        (read_xml, '<?xml version="1.0" encoding="klingon"?><a/>', "encoding 'klingon' is unknown"),
        (read_xml, b'<?xml version="1.0" encoding="GB2312"?><a>\xff</a>', "is not in the encoding 'GB2312'"),
        (read_xml, "<a>", "not XML: no element found"),
        (read_xml, "", "not XML"),
        (read_rows, 'a,b\nx.png,"1\ny.png,2\n', 'a quote (") is opened and never closed'),
        (read_rows, "a\n" + "x" * 11_000_000, ":2: not CSV: field larger than field limit"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_soon(tmp_path: Path, read: Read, content: str | bytes, words: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.perf_counter()
    with pytest.raises(UmedError) as caught:
        read(path)
    assert time.perf_counter() - start < 60, "some milliseconds, unless an effort grows with the square of the file"
    assert str(caught.value).startswith(f"{path}:")
    assert words in str(caught.value)


def test_long_cells_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"a,b\n1,{'x' * 200_000}\n")
    assert len(read_rows(tmp_path / "a.csv")[1][1]) == 200_000


@pytest.mark.parametrize("read", [read_json, read_yaml, read_xml, read_rows, read_text])
def test_a_folder_in_place_of_a_file(tmp_path: Path, read: Read) -> None:
    with pytest.raises(UmedError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_recipes_and_records_are_read_so(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: " + "[" * 20_000)
    with pytest.raises(UmedError, match=r"a\.yaml: not YAML that can be read: it is nested too deeply"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "r.json").write_bytes(b"\xef\xbb\xbf[]")
    assert load_records(tmp_path / "r.json") == []
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(UmedError, match=r"r\.json: .*nested too deeply"):
        load_records(tmp_path / "r.json")
