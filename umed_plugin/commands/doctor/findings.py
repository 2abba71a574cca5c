"""What a finding is, and the change that ``--fix`` would make for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Kind:
    """One thing that can be found, as it stands in the table of docs/doctor.md.

    Attributes:
        code: its name, for programs.
        severity: ``error`` (LLaVA fails, or answers with another model than was trained), ``warning`` (it depends on how the
            checkpoint is used), ``note`` (good to know).
        what: what is found, in a few words.
        why: what it leads to.
        remedy: what to do; names in braces are filled in for the checkpoint at hand.
        fix: what ``--fix`` changes where that is safe; empty where nothing is changed.
    """

    code: str
    severity: str
    what: str
    why: str
    remedy: str
    fix: str = ""


@dataclass(frozen=True)
class JsonChange:
    """New values in a small JSON file of the checkpoint.

    Attributes:
        file: made when it does not exist.
        values: keys of the file's top level that get a value.
        remove: keys that go.
    """

    file: Path
    values: dict[str, Any]
    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that was found in a checkpoint or an environment.

    Attributes:
        code: of its `Kind`.
        severity: ``error``, ``warning`` or ``note``.
        found: what was found, with the values.
        where: file, and key or tensor.
        why: what it leads to.
        remedy: what to do.
        change: what ``--fix`` would do; None where a person has to decide.
    """

    code: str
    severity: str
    found: str
    where: str
    why: str
    remedy: str
    change: JsonChange | None = None

    @property
    def fixable(self) -> bool:
        return self.change is not None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "code": self.code,
            "severity": self.severity,
            "found": self.found,
            "where": self.where,
            "why": self.why,
            "remedy": self.remedy,
            "fixable": self.fixable,
        }
