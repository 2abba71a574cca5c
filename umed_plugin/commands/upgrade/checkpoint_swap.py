"""``in_place``: swap the result with the input by two renames at the very end, and keep the old folder beside it.

Between the two renames there is no checkpoint at the input's path. A run that is killed there completes the swap when it is
started again.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

from umed_plugin.commands.upgrade.provenance import read_json
from umed_plugin.errors import UmedError
from umed_plugin.files import replacing_folder, write_json
from umed_plugin.files.locks import locked


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

    def done(self) -> bool:
        """Whether the swap is complete. The backup may be gone since: it is the user's."""
        return self.begun() and read_json(self.state_file).get("done") is True

    def finish(self, result: Path) -> None:
        """Do the steps of the swap that are left to do; nothing, once it is complete.

        Raises:
            UmedError: another process writes the checkpoint, or somebody has moved the folders meanwhile, so that a rename would
                lose one of them.
        """
        if self.done():
            return
        with locked(self.checkpoint, flag=None):
            if not self.begun():
                self._stage(result)
                write_json(self.state_file, {"result": str(result), "old": str(self.backup), "done": False})
            if not self._holds(result):
                self._place(result)
            write_json(self.state_file, {**read_json(self.state_file), "done": True})

    def _place(self, result: Path) -> None:
        """Bring the result to the checkpoint's path; what is there becomes the backup."""
        if not self.staged.exists():
            self._stage(result)
        if self.checkpoint.exists():
            if self.backup.exists():
                raise UmedError(
                    f"in_place: {self.checkpoint} and {self.backup} both exist, and neither is the result. Move one of them "
                    f"away, and give the command again. The result is {result}."
                )
            os.replace(self.checkpoint, self.backup)
        os.replace(self.staged, self.checkpoint)

    def _holds(self, result: Path) -> bool:
        """Whether the checkpoint's path holds the result already: all of its files, of the same sizes."""
        if self.staged.exists() or not self.checkpoint.is_dir():
            return False
        files = [file for file in result.rglob("*") if file.is_file() and file.name != "config.json"]
        places = [(file, self.checkpoint / file.relative_to(result)) for file in files]
        same_sizes = all(there.is_file() and there.stat().st_size == file.stat().st_size for file, there in places)
        return same_sizes and all(filecmp.cmp(file, there, shallow=False) for file, there in places)

    def _stage(self, result: Path) -> None:
        """Copy the result beside the checkpoint, on the same file system, with the paths that it will have in its place."""
        inputs = (result, self.checkpoint, self.backup)
        with replacing_folder(self.staged, overwrite=True, inputs=inputs, foreign=_foreign) as partial:
            shutil.copytree(result, partial, dirs_exist_ok=True)
            config = read_json(partial / "config.json")
            tower = Path(config.get("mm_vision_tower", ""))
            if result in tower.parents:
                config["mm_vision_tower"] = str(self.checkpoint / tower.relative_to(result))
                write_json(partial / "config.json", config, indent=2)


def _foreign(folder: Path) -> str | None:
    return (
        None if (folder / "config.json").is_file() else "it has no config.json, so it is not the copy of a checkpoint"
    )
