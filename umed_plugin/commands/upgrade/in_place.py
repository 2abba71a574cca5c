"""The result takes the input's place: by two renames at the very end, with the old folder kept beside it.

For an instant between the renames nothing lies at the checkpoint's path; a run that is killed there ends the swap when it is
started again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from umed_plugin.commands.upgrade.made import read_json
from umed_plugin.errors import UmedError
from umed_plugin.files import replacing_folder, write_json


class Swap:
    """Puts the result of a run where its input is.

    Args:
        folder: of the run.
        checkpoint: the input.
    """

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.note = folder / "made" / "in_place.json"
        self.checkpoint = checkpoint
        self.old = checkpoint.with_name(f"{checkpoint.name}.before-umed")
        self.new = checkpoint.with_name(f"{checkpoint.name}.umed-new")

    def begun(self) -> bool:
        """Whether the input may be away or replaced: from then on only the swap itself can be gone on with."""
        return self.note.is_file()

    def check(self) -> None:
        """See beforehand that nothing is in the way.

        Raises:
            UmedError: something is.
        """
        if self.old.exists():
            raise UmedError(
                f"in_place: {self.old} exists, from an earlier upgrade perhaps, and the old checkpoint could not be kept there. "
                "Move it away."
            )
        if not os.access(self.checkpoint.parent, os.W_OK):
            raise UmedError(f"in_place: {self.checkpoint.parent} cannot be written to.")

    def finish(self, result: Path) -> None:
        """Do what is left of putting ``result`` there."""
        if not self.begun():
            self._copy(result)
            write_json(self.note, {"result": str(result), "old": str(self.old), "done": False})
        if not self.old.exists():
            os.replace(self.checkpoint, self.old)
        if self.new.exists():
            os.replace(self.new, self.checkpoint)
        write_json(self.note, {**read_json(self.note), "done": True})

    def _copy(self, result: Path) -> None:
        """The result beside the checkpoint, on the same file system, as it will be named in its place."""
        with replacing_folder(self.new, overwrite=True) as partial:
            shutil.copytree(result, partial, dirs_exist_ok=True)
            config = read_json(partial / "config.json")
            tower = Path(config.get("mm_vision_tower", ""))
            if result in tower.parents:
                config["mm_vision_tower"] = str(self.checkpoint / tower.relative_to(result))
                write_json(partial / "config.json", config, indent=2)
