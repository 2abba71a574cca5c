"""What is wrong with a checkpoint, before LLaVA, training or a person finds out.

`examine` looks into a folder and returns findings, each with what was found, where, why it matters and what to do; `diagnose`
says beside that what the checkpoint is. Nothing in it is run: config files are read, headers of weight files, then each tensor
once and in pieces, and pickles by a reader that calls nothing. LLaVA itself is not needed.

Everything that can be found is listed in `umed_plugin.commands.doctor.catalogue`. How to run: ``umed doctor CKPT``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.commands.doctor.adapter import check_adapter
from umed_plugin.commands.doctor.configuration import check_configuration
from umed_plugin.commands.doctor.contents import read_contents
from umed_plugin.commands.doctor.findings import ERROR, NOTE, SEVERITIES, WARNING, Finding
from umed_plugin.commands.doctor.fixes import fix
from umed_plugin.commands.doctor.identity import Identity, identify
from umed_plugin.commands.doctor.names import check_name
from umed_plugin.commands.doctor.tokens import check_tokens
from umed_plugin.commands.doctor.tower import check_tower
from umed_plugin.commands.doctor.values import check_values, read_values
from umed_plugin.errors import UsageError

__all__ = [
    "ERROR", "NOTE", "SEVERITIES", "WARNING", "Diagnosis", "Finding", "Identity", "diagnose", "examine", "fix",
]  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What a checkpoint is, and what was found in it, the worst first."""

    checkpoint: str
    identity: Identity
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checkpoint": self.checkpoint,
            "identity": self.identity.as_dict(),
            "findings": [one.as_dict() for one in self.findings],
        }


def examine(checkpoint: Path | str, base: Path | str | None = None) -> list[Finding]:
    """The findings about a checkpoint, the worst first; see `diagnose`."""
    return diagnose(checkpoint, base).findings


def diagnose(
    checkpoint: Path | str,
    base: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Look at a checkpoint.

    Args:
        checkpoint: folder of a full checkpoint, a LoRA run's output, or a projector, in LLaVA's or transformers' form.
        base: of a LoRA folder or projector; by default the one that its files name.
        progress: called with (bytes of weights read, bytes in all).

    Raises:
        UsageError: one of the two is not a folder.

    Example:
        >>> import tempfile
        >>> from umed_plugin import diagnose
        >>> [finding.code for finding in diagnose(tempfile.mkdtemp()).findings]
        ['config-missing', 'weights-missing']
    """
    for path in (checkpoint, base):
        if path is not None and not Path(path).is_dir():
            raise UsageError(
                f"{path}: no such folder. Needed: a checkpoint on this machine. One on the Hugging Face hub is fetched with: "
                "huggingface-cli download NAME --local-dir DIR"
            )
    contents = read_contents(Path(checkpoint).absolute(), None if base is None else Path(base).absolute())
    values = read_values(contents, progress)
    found = [
        *contents.findings,
        *check_configuration(contents),
        *check_tokens(contents),
        *check_tower(contents),
        *check_values(contents, values),
        *check_adapter(contents),
        *check_name(contents),
    ]
    found.sort(key=lambda one: SEVERITIES.index(one.severity))
    return Diagnosis(str(checkpoint), identify(contents, values), found)
