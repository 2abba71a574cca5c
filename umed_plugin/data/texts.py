"""Reading text files that others wrote: JSON, YAML, XML and CSV. What cannot be read is one `UmedError`, never a traceback.

A byte-order mark, as Excel and PowerShell write it, is skipped everywhere. Nesting is limited, so that a file made of brackets
ends in a message within a second. A key that appears twice is a mistake: the libraries would silently keep the last value.
"""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from umed_plugin.errors import UmedError

MOST_NESTED = 100
# Of one CSV cell, in characters. Report texts are long; Python's own limit is 131,072.
_MOST_IN_A_CELL = 10_000_000
_DECLARATION = re.compile(r"""^\s*<\?xml[^>]*?(?:encoding\s*=\s*["']([A-Za-z0-9._-]+)["'][^>]*?)?\?>""")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark. UTF-16 with a byte-order mark is read too.

    Raises:
        UmedError: the file cannot be read, or is in another encoding; the line and the byte are named.
    """
    data = _bytes(path)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return _decoded(path, data, "utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UmedError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8. Save the file as UTF-8; if it is Latin-1 (Western "
            f"Europe), with: iconv -f LATIN1 -t UTF-8 {path.name} > new{path.suffix}"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UmedError: the file is not JSON, is nested too deeply, or an object has a key twice.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except RecursionError as error:
        raise UmedError(f"{path}: not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise UmedError(f"{path}: not JSON: {error}") from error


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``; a ValueError if a key appears twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"the key {twice[:80]!r} appears twice in one object, and only one of its values could be read"
        )
    return found


class NoDuplicates(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if repr(key) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", node.start_mark)
            seen.add(repr(key))
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, loaded without running any code.

    Raises:
        UmedError: the file is not YAML, is nested too deeply, or a mapping has a key twice.
    """
    return parse_yaml(_bytes(path), path)


def parse_yaml(text: str | bytes, where: object) -> Any:
    """The content of a YAML text; ``where`` it comes from, for the message.

    Raises:
        UmedError: as `read_yaml`.
    """
    try:
        _check_nesting(text)
        return yaml.load(text, Loader=NoDuplicates)
    except RecursionError as error:
        raise UmedError(f"{where}: not YAML that can be read: it is nested too deeply") from error
    # A ValueError comes from scalars such as the date 2024-99-99.
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UmedError(f"{where}: not valid YAML: {error}") from error


def _check_nesting(text: str | bytes) -> None:
    """Stop at the first event that is nested too deeply: PyYAML's scanner needs quadratic time for 20,000 brackets."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise RecursionError


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file, in the encoding that it declares.

    Raises:
        UmedError: the file is not XML, its encoding is unknown or wrong, it declares entities, or it is nested too deeply.
    """
    text = _xml_text(path)
    if re.search(r"<!ENTITY", text):
        raise UmedError(
            f"{path}: declares XML entities, which can expand without end and are not read. Remove <!ENTITY ...>"
        )
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise UmedError(f"{path}: not XML: {error}") from error
    level, depth = [root], 0
    while level:
        level, depth = [child for element in level for child in element], depth + 1
        if depth > MOST_NESTED:
            raise UmedError(f"{path}: not XML that can be read: it is nested too deeply")
    return root


def _xml_text(path: Path) -> str:
    """The text after its XML declaration. Expat itself knows no multi-byte encodings such as GB2312."""
    data = _bytes(path)
    marked = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb": "utf-8-sig"}.get(data[:2])
    declared = _DECLARATION.match(data[:500].decode("latin-1"))
    encoding = marked or (declared.group(1) if declared else None) or "utf-8"
    text = _decoded(path, data, encoding)
    return _DECLARATION.sub("", text, count=1)


def read_rows(path: Path, delimiter: str = ",") -> list[list[str]]:
    """The rows of a CSV file, the header among them; errors as of `read_numbered_rows`."""
    return [row for _, row in read_numbered_rows(path, delimiter)]


def read_numbered_rows(path: Path, delimiter: str = ",") -> list[tuple[int, list[str]]]:
    """The rows of a CSV file, the header among them, each with the number of its first line: a cell may have several lines.

    Raises:
        UmedError: the file cannot be read, a quote is never closed, or a cell is longer than 10 million characters.
    """
    text = read_text(path)
    if '"' in text and _ends_in_a_quote(text, delimiter):
        raise UmedError(f'{path}: a quote (") is opened and never closed, so that all rows after it would be one cell')
    before = csv.field_size_limit(_MOST_IN_A_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[tuple[int, list[str]]] = []
    last = 0
    try:
        for row in reader:
            rows.append((last + 1, row))
            last = reader.line_num
        return rows
    except csv.Error as error:
        raise UmedError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _ends_in_a_quote(text: str, delimiter: str) -> bool:
    before = csv.field_size_limit(_MOST_IN_A_CELL)
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    finally:
        csv.field_size_limit(before)
    return False


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UmedError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decoded(path: Path, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise UmedError(f"{path}: the encoding {encoding!r} is unknown. Save the file as UTF-8") from error
    except ValueError as error:
        raise UmedError(f"{path}: is not in the encoding {encoding!r}: {error}. Save the file as UTF-8") from error
