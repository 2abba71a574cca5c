"""Find the problems of a checkpoint before LLaVA or a training run hits them.

`examine` returns findings: what was found, where, why it matters and what to do. `diagnose` also identifies the checkpoint. No
code in the checkpoint is run: config files and headers of weight files are read, then each tensor once, in pieces. Pickles are
read by a reader that calls nothing. LLaVA itself is not needed.

All findings are listed in `umed_plugin.commands.doctor.catalogue`. How to run: ``umed doctor CKPT``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.commands.doctor.adapter import check_adapter
from umed_plugin.commands.doctor.beside import check_beside
from umed_plugin.commands.doctor.configuration import check_configuration
from umed_plugin.commands.doctor.contents import read_contents
from umed_plugin.commands.doctor.findings import ERROR, NOTE, SEVERITIES, WARNING, Finding
from umed_plugin.commands.doctor.fixes import fix
from umed_plugin.commands.doctor.identity import Identity, identify
from umed_plugin.commands.doctor.names import check_name
from umed_plugin.commands.doctor.tokens import check_tokens
from umed_plugin.commands.doctor.tower import check_tower
from umed_plugin.commands.doctor.values import check_values, read_values
from umed_plugin.errors import UsageError, warn

__all__ = [
    "ERROR", "NOTE", "SEVERITIES", "WARNING", "Diagnosis", "Finding", "Identity", "diagnose", "errors_of_result", "examine",
    "fix",
]  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What a checkpoint is, and its findings, the most severe first."""

    checkpoint: str
    identity: Identity
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON."""
        return {
            "checkpoint": self.checkpoint,
            "identity": self.identity.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def examine(checkpoint: Path | str, base: Path | str | None = None) -> list[Finding]:
    """Return the findings about a checkpoint, the most severe first; see `diagnose`."""
    return diagnose(checkpoint, base).findings


def examine_files(checkpoint: Path | str) -> list[Finding]:
    """The findings about a checkpoint's files, configuration, tokenizer and tower, without reading the values of its weights."""
    contents = read_contents(Path(checkpoint).absolute())
    return [
        *contents.findings,
        *check_configuration(contents),
        *check_tokens(contents),
        *check_tower(contents, compares=False),
        *check_beside(contents),
        *check_name(contents),
    ]


def diagnose(
    checkpoint: Path | str,
    base: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Identify a checkpoint and find its problems.

    Args:
        checkpoint: folder of a full checkpoint, a LoRA run's output, or a projector, in LLaVA's or transformers' form.
        base: base of a LoRA folder or projector; by default the one that its files name.
        progress: called with (bytes of weights read, total bytes).

    Raises:
        UsageError: ``checkpoint`` or ``base`` is not a folder.

    Example:
        >>> import tempfile
        >>> from umed_plugin import diagnose
        >>> [finding.code for finding in diagnose(tempfile.mkdtemp()).findings]
        ['config-missing', 'weights-missing']
    """
    for path in (checkpoint, base):
        if path is not None and not Path(path).is_dir():
            raise UsageError(
                f"{path}: no such folder. Needed: a checkpoint on this machine. To download one from the Hugging Face hub, run: "
                "huggingface-cli download NAME --local-dir DIR"
            )
    contents = read_contents(Path(checkpoint).absolute(), None if base is None else Path(base).absolute())
    values = read_values(contents, progress)
    findings = [
        *contents.findings,
        *check_configuration(contents),
        *check_tokens(contents),
        *check_tower(contents),
        *check_beside(contents),  # after the check of the tower, which reads files too
        *check_values(contents, values),
        *check_adapter(contents),
        *check_name(contents),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(str(checkpoint), identify(contents, values), findings)


def errors_of_result(out: Path, source: Path) -> int:
    """Warn of each error that the doctor finds in a checkpoint that was just written, and not in its source; return their number.

    Names of folders are left to `stock_name_fault`; the values of the weights are not read again.
    """
    known = {finding.code for finding in examine_files(source)}
    new = [
        finding
        for finding in examine_files(out)
        if finding.severity == ERROR and finding.code not in known and not finding.code.startswith("name-")
    ]
    for finding in new:
        warn(f"{finding.code}: {finding.found} ({finding.where}). {finding.remedy}")
    return len(new)
