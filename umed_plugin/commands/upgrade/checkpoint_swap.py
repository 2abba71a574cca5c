"""``in_place``: swap the result with the input by two renames at the very end, and keep the old folder beside it.

Between the two renames there is no checkpoint at the input's path. A run that is killed there completes the swap when it is
started again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from umed_plugin.commands.upgrade.provenance import read_json
from umed_plugin.errors import UmedError
from umed_plugin.files import replacing_folder, write_json


class CheckpointSwap:
    """Puts the result of a run where its input is.

    Args:
        run: folder of the run.
        checkpoint: the input.

    Attributes:
        state_file: exists from the moment the swap begins.
        backup: where the old checkpoint is kept.
        staged: copy of the result beside the checkpoint, before it takes the checkpoint's name.
    """

    def __init__(self, run: Path, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.state_file = run / "made" / "in_place.json"
        self.backup = checkpoint.with_name(f"{checkpoint.name}.before-umed")
        self.staged = checkpoint.with_name(f"{checkpoint.name}.umed-new")

    def begun(self) -> bool:
        """Whether the input may have been moved or replaced; from then on a run can only complete the swap."""
        return self.state_file.is_file()

    def check(self) -> None:
        """Check before training that the swap will be possible.

        Raises:
            UmedError: the backup's path is taken, or the folder is not writable.
        """
        if self.backup.exists():
            raise UmedError(
                f"in_place: {self.backup} exists, perhaps from an earlier upgrade, and the old checkpoint could not be kept "
                "there. Move it away."
            )
        if not os.access(self.checkpoint.parent, os.W_OK):
            raise UmedError(
                f"in_place: {self.checkpoint.parent} is not writable. Make it writable, or leave in_place out."
            )

    def finish(self, result: Path) -> None:
        """Do the steps of the swap that are left to do."""
        if not self.begun():
            self._stage(result)
            write_json(self.state_file, {"result": str(result), "old": str(self.backup), "done": False})
        if not self.backup.exists():
            os.replace(self.checkpoint, self.backup)
        if self.staged.exists():
            os.replace(self.staged, self.checkpoint)
        write_json(self.state_file, {**read_json(self.state_file), "done": True})

    def _stage(self, result: Path) -> None:
        """Copy the result beside the checkpoint, on the same file system, with the paths that it will have in its place."""
        with replacing_folder(self.staged, overwrite=True) as partial:
            shutil.copytree(result, partial, dirs_exist_ok=True)
            config = read_json(partial / "config.json")
            tower = Path(config.get("mm_vision_tower", ""))
            if result in tower.parents:
                config["mm_vision_tower"] = str(self.checkpoint / tower.relative_to(result))
                write_json(partial / "config.json", config, indent=2)
