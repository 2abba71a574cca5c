"""A finding of the doctor, and the change that ``--fix`` makes for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Kind:
    """One kind of finding: a row of the table in docs/doctor.md.

    Attributes:
        code: its identifier, for programs.
        severity: ``error`` (LLaVA fails, or answers with a model other than the trained one), ``warning`` (depends on how the
            checkpoint is used), ``note`` (good to know).
        what: what is found, in a few words.
        why: its consequences.
        remedy: what to do; names in braces are filled in for each checkpoint.
        fix: what ``--fix`` changes, where that is safe; empty if it changes nothing.
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
        file: created if it does not exist.
        values: top-level keys to set, with their values.
        remove: top-level keys to remove.
    """

    file: Path
    values: dict[str, Any]
    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One problem or fact that was found in a checkpoint or an environment.

    Attributes:
        code: the code of its `Kind`.
        severity: ``error``, ``warning`` or ``note``.
        found: what was found, with the values.
        where: file, and key or tensor.
        why: its consequences.
        remedy: what to do.
        change: what ``--fix`` changes; None if the user must decide.
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
        """The finding as JSON, without the change."""
        return {
            "code": self.code,
            "severity": self.severity,
            "found": self.found,
            "where": self.where,
            "why": self.why,
            "remedy": self.remedy,
            "fixable": self.fixable,
        }
