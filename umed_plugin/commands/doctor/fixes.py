"""``--fix``: the changes that are safe, in small JSON files alone. Weights are never written.

A file that is changed is kept beside it under a further name first, then written aside and renamed: a crash leaves the old or the
new one, and never half of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from umed_plugin import files
from umed_plugin.commands.doctor.contents import read_object
from umed_plugin.commands.doctor.findings import Finding, JsonChange

BACKUP = "before-doctor"
# One change may uncover what could not be seen before it; more rounds than this would be a loop.
_ROUNDS = 5


def fix(find: Callable[[], list[Finding]], say: Callable[[str], None]) -> list[Finding]:
    """Make the changes of all findings that have one, until there is none left; return what is found in the end.

    Args:
        find: looks at the checkpoint anew.
        say: is told what was done.
    """
    found = find()
    for _ in range(_ROUNDS):
        changes = _by_file(found)
        if not changes:
            return found
        for file, those in changes.items():
            apply(file, those, say)
        found = find()
    return found


def _by_file(found: list[Finding]) -> dict[Path, list[Finding]]:
    files: dict[Path, list[Finding]] = {}
    for one in found:
        if one.change is not None:
            files.setdefault(one.change.file, []).append(one)
    return files


def apply(file: Path, found: list[Finding], say: Callable[[str], None]) -> None:
    """Make the changes of ``found``, all of them in ``file``."""
    old = read_object(file)
    new = dict(old)
    for one in found:
        assert one.change is not None
        new = changed(new, one.change)
    if file.is_file():
        backup = _backup(file)
        say(f"{file}: the old one is kept as {backup.name}")
    files.write_json(file, new, indent=2)
    for one in found:
        say(f"{file}: {_said(old, one)}")


def changed(values: dict, change: JsonChange) -> dict:
    """``values`` with the change made."""
    return {**{key: value for key, value in values.items() if key not in change.remove}, **change.values}


def _backup(file: Path) -> Path:
    number = 1
    while True:
        backup = file.with_name(f"{file.name}.{BACKUP}" + (f"-{number}" if number > 1 else ""))
        if not backup.exists():
            break
        number += 1
    with files.replacing(backup) as partial:
        shutil.copy2(file, partial)
    return backup


def _said(old: dict, one: Finding) -> str:
    change = one.change
    assert change is not None
    parts = []
    for key, value in change.values.items():
        was = _short(old[key]) if key in old else "not set"
        parts.append(f"{key} is {_short(value)} (was {was})")
    parts += [f"{key} is gone (was {_short(old.get(key))})" for key in change.remove]
    return f"{'; '.join(parts)} [{one.code}]"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
