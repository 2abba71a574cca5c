"""What each step of a run was made from: recorded when it begins, completed with the hashes of its outputs when it ends.

A step is done if its file in ``made/`` says so, settings and inputs are still the recorded ones, and its outputs are unchanged on
disk. Every difference is named. Nothing that was made from other settings is silently reused or continued.
Data from which records are built, and those of ``evaluation.recipe``, count by a stamp of their annotations and of size and time
of their images. It is compared where both starts have one: the data may be gone by now, and earlier releases wrote none.
A file that a setting names, such as a teacher, is compared with the settings, before anything runs. Earlier releases noted
``deepspeed`` alone. What else a training of theirs was made with is not known, so it is not refused.
Each file is hashed once. Its size and modification time are kept beside the hash; if they differ, the file is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from umed_plugin import __version__
from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.errors import UmedError
from umed_plugin.files import file_stamp, read_object, write_json

# The manifest lists their versions.
_LIBRARIES = (
    *("llava-torch", "llava", "torch", "torchvision", "transformers", "tokenizers", "peft", "accelerate", "deepspeed"),
    *("monai", "pydicom", "nibabel", "pillow", "numpy"),
)
MANIFEST = "umed_manifest.json"
JsonObject = dict[str, Any]


class Provenance:
    """The records of one run's steps, ``made/STEP.json``.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "made"
        # File -> its hash, size and modification time, as last read.
        self._hashed: dict[Path, JsonObject] = {}
        for file in sorted(self.folder.glob("*.json")):
            record = read_json(file)
            self._hashed.update({Path(state["path"]): state for state in record.get("inputs", {}).values()})
            self._hashed.update({run / name: state for name, state in (record.get("outputs") or {}).items()})

    def read(self, step: Step) -> JsonObject | None:
        """The record of a step; None if it has not begun."""
        file = self.folder / f"{step.name}.json"
        return read_json(file) if file.is_file() else None

    def is_done(self, step: Step) -> bool:
        """Whether the step has ended and its outputs are there, unchanged."""
        record = self.read(step)
        return record is not None and record["outputs"] is not None and not self._damaged(record)

    def _damaged(self, record: JsonObject) -> list[str]:
        """Outputs that are missing or have changed, relative to the run's folder."""
        return [name for name, state in record["outputs"].items() if self.hash_of(self.run / name) != state["sha256"]]

    def hash_of(self, file: Path) -> str | None:
        """The SHA-256 of a file, hashed only if it is not known yet; None if there is no such file."""
        return str(self._state(file)["sha256"]) if file.is_file() else None

    def _state(self, file: Path) -> JsonObject:
        known, stamp = self._hashed.get(file), file_stamp(file)
        if known is None or (known["bytes"], known["changed_ns"]) != stamp:
            known = {"sha256": sha256(file), "bytes": stamp[0], "changed_ns": stamp[1]}
            self._hashed[file] = known
        return known

    def hashes(self, folder: Path) -> dict[str, str]:
        """File in the folder -> SHA-256."""
        return {str(file.relative_to(folder)): self._state(file)["sha256"] for file in files_of(folder)}

    def _states(self, inputs: Mapping[str, Path]) -> dict[str, JsonObject]:
        """Role of each file in a step -> its path, hash, size and modification time."""
        files = ((role, path, file) for role, path in inputs.items() for file in files_of(path))
        return {
            (role if file == path else f"{role}/{file.relative_to(path)}"): {"path": str(file), **self._state(file)}
            for role, path, file in files
        }

    def differences(self, step: Step, *, inputs: bool, named_files: bool = True) -> list[str]:
        """What has changed since the step began, as text; empty for a step that has not begun.

        Args:
            step: as planned now.
            inputs: compare the content of the inputs too.
            named_files: compare that of the files which settings name.
        """
        record = self.read(step)
        if record is None:
            return []
        before, now = record["settings"], {**step.settings, **step.digests}
        changed = [
            f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        changed += self._stamp_differences(step, record)
        if named_files:
            noted = {name: path for name, path in step.files.items() if name in record.get("inputs", {})}
            changed += self._changed_files(noted, record)
        return changed + (self._changed_files(step.inputs, record) if inputs else [])

    def _stamp_differences(self, step: Step, record: JsonObject) -> list[str]:
        before = record.get("stamps", {})
        # A step that has not ended begins anew, from the data as they are: the fault in them that ended it may be mended.
        if not before or record["outputs"] is None:
            return []
        now = step.stamps()
        return [
            f"{what}: annotations or images have changed"
            for what in before
            if what in now and now[what] != before[what]
        ]

    def _changed_files(self, inputs: Mapping[str, Path], record: JsonObject) -> list[str]:
        if "inputs" not in record:  # an early record
            return []
        before = {role: state["sha256"] for role, state in record["inputs"].items()}
        # An input that was deleted to save space does not count as changed.
        changed = [(role, state) for role, state in self._states(inputs).items() if before.get(role) != state["sha256"]]
        lines = [f"{role} ({state['path']}) is not the file that it was" for role, state in changed[:3]]
        return lines + ([f"... and {len(changed) - 3} more files"] if len(changed) > 3 else [])

    def damage(self, step: Step) -> list[str]:
        """Which outputs of a finished step were changed, as text; a deleted output does not count."""
        record = self.read(step)
        if record is None or record["outputs"] is None:
            return []
        changed = [self.run / name for name in self._damaged(record) if (self.run / name).is_file()]
        return [f"{path} was changed after it was made" for path in changed[:3]]

    def begin(self, step: Step) -> None:
        """Record what the step is made from. Remove what an earlier attempt left, unless the step can resume from it.

        Raises:
            UmedError: an output exists, but no record says what it was made from.
        """
        if self.read(step) is None:
            foreign = [str(path) for path in step.outputs if path.exists()]
            if foreign:
                raise UmedError(
                    f"{foreign[0]}: exists already, but {self.folder}/{step.name}.json, which would say what it was made from, "
                    "does not. Move it away, or choose another --out."
                )
        elif not step.resumable:
            self.forget(step)
        stamps = dict(step.stamps())
        record = {
            "step": step.title,
            "command": list(step.command),
            "settings": {**step.settings, **step.digests},
            "inputs": self._states({**step.inputs, **step.files}),
            **({"stamps": stamps} if stamps else {}),
            "versions": versions(),
            "outputs": None,
        }
        write_json(self.folder / f"{step.name}.json", record)

    def end(self, step: Step) -> None:
        """Record that the step has ended, and the hashes of its outputs.

        Raises:
            UmedError: an output is missing.
        """
        record = self.read(step)
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing or record is None:
            raise UmedError(
                f"{step.title}: ended with status 0, but {', '.join(missing)} does not exist. Its command: {step.line()}"
            )
        files = [file for path in step.outputs for file in files_of(path)]
        outputs = {str(file.relative_to(self.run)): self._state(file) for file in files}
        write_json(self.folder / f"{step.name}.json", {**record, "outputs": outputs})

    def forget(self, step: Step) -> None:
        """Remove the step's outputs, and then its record."""
        for path in step.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.folder / f"{step.name}.json").unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
    """The file, or all files below a folder, except what a trainer keeps to resume from, and our manifest."""
    if path.is_file():
        return [path]
    inside = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    excluded = ("checkpoint-", "tmp-checkpoint-", "best_weights", MANIFEST)
    return sorted(file for file in inside if not file.relative_to(path).parts[0].startswith(excluded))


def sha256(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Library -> version in this environment."""
    installed = {"python": sys.version.split()[0], "umed-plugin": __version__}
    for name in _LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue  # LLaVA has two names; DeepSpeed is optional
    return installed


def read_json(file: Path) -> JsonObject:
    """A JSON object."""
    return read_object(file)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
