"""``--fix``: apply the safe changes, to small JSON files only. Weights are never written.

Each file is backed up beside the original first. The new content is written to another file that then replaces it: a crash leaves
either the old or the new file, never a partial one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from umed_plugin import files
from umed_plugin.commands.doctor.contents import read_object
from umed_plugin.commands.doctor.findings import Finding, JsonChange
from umed_plugin.files.locks import locked

BACKUP = "before-doctor"
# One fix may uncover further problems; more rounds than this would be an endless loop.
_ROUNDS = 5


def fix(find: Callable[[], list[Finding]], say: Callable[[str], None]) -> list[Finding]:
    """Apply the changes of all findings that have one, until none is left. Return the remaining findings.

    Args:
        find: examines the checkpoint again.
        say: called with a description of each change.
    """
    findings = find()
    for _ in range(_ROUNDS):
        by_file = _by_file(findings)
        if not by_file:
            return findings
        for file, fixable in by_file.items():
            with locked(file, flag=None):
                apply(file, fixable, say)
        findings = find()
    return findings


def _by_file(findings: list[Finding]) -> dict[Path, list[Finding]]:
    by_file: dict[Path, list[Finding]] = {}
    for finding in findings:
        if finding.change is not None:
            by_file.setdefault(finding.change.file, []).append(finding)
    return by_file


def apply(file: Path, findings: list[Finding], say: Callable[[str], None]) -> None:
    """Apply the changes of ``findings``, all of which are in ``file``.

    Args:
        file: created if it does not exist, else backed up first.
        findings: each has a change.
        say: called with a description of each change.
    """
    old = read_object(file)
    new = dict(old)
    for finding in findings:
        assert finding.change is not None
        new = changed(new, finding.change)
    if file.is_file():
        backup = _backup(file)
        say(f"{file}: the original is kept as {backup.name}")
    files.write_json(file, new, indent=2)
    for finding in findings:
        say(f"{file}: {_described(old, finding)}")


def changed(values: dict, change: JsonChange) -> dict:
    """Return ``values`` with the change applied."""
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


def _described(old: dict, finding: Finding) -> str:
    change = finding.change
    assert change is not None
    parts = []
    for key, value in change.values.items():
        previous = _short(old[key]) if key in old else "not set"
        parts.append(f"{key} is {_short(value)} (was {previous})")
    parts += [f"{key} is removed (was {_short(old.get(key))})" for key in change.remove]
    return f"{'; '.join(parts)} [{finding.code}]"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
