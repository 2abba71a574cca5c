"""Check the folder of an upgrade before anything is written, and in a dry run: that it is one, and apart from what the run reads.

How to run: ``check_folder(folder, upgrade.steps, upgrade.origin)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from umed_plugin.commands.upgrade.origin import Origin
from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.commands.upgrade.settings import RUN_FILE
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.files.locks import INSIDE


def check_folder(folder: Path, steps: Sequence[Step], origin: Origin) -> None:
    """Refuse a folder in which the run could not be, or could not be continued. Nothing is written.

    Args:
        folder: of the run, absolute and without links; it need not exist.
        steps: of the run.
        origin: the checkpoint to upgrade.

    Raises:
        UmedError: the folder holds something else.
        UsageError: it lies inside an input of the run, or an input lies where the run writes.
    """
    outputs = {output for step in steps for output in step.outputs}
    read = {"checkpoint": origin.checkpoint, "base": origin.full}
    read.update({role: path for step in steps for role, path in step.inputs.items() if path not in outputs})
    for role, path in read.items():
        _refuse_overlap(folder, outputs, role, path)
    _refuse_foreign(folder)


def _refuse_overlap(folder: Path, outputs: set[Path], role: str, path: Path) -> None:
    real = path.resolve()
    if folder == real or real in folder.parents:
        # All files of an input count: with those of the run among them, it changes with each step, and no start goes on.
        raise UsageError(
            f"{folder}: {'is' if folder == real else 'lies inside'} the {role} {path}, which the run reads. Choose another "
            "--out, outside of it."
        )
    if any(output == real or output in real.parents for output in outputs):
        # A step that is done again removes what it has made.
        raise UsageError(
            f"{path}: the run in {folder} reads it as its {role}, and would replace it. Choose another --out."
        )


def _refuse_foreign(folder: Path) -> None:
    # Lock and partial settings are left by a start that was killed before it had written its settings.
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = {name for name in names if name != INSIDE and not name.startswith(RUN_FILE)}
    if RUN_FILE not in names and foreign:
        raise UmedError(
            f"{folder}: contains files but no {RUN_FILE}, so it is not the folder of an upgrade. Choose another --out."
        )
