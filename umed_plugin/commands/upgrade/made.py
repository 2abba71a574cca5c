"""What each step of a run was made from: written when it begins, completed with the hashes of what it made when it has ended.

A step counts as done when its file in ``made/`` says so, the settings and inputs it names are those of now, and what it made
lies on disk unchanged. Whatever differs is named; nothing that was made from other settings is used again, or gone on with,
without a word. Files are hashed once: size and time of change stand beside the hash, and a file is read again when they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from umed_plugin import __version__
from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.errors import UmedError
from umed_plugin.files import write_json

# Their versions stand in the manifest.
_LIBRARIES = (
    *("llava-torch", "llava", "torch", "torchvision", "transformers", "tokenizers", "peft", "accelerate", "deepspeed"),
    *("monai", "pydicom", "nibabel", "pillow", "numpy"),
)
MANIFEST = "umed_manifest.json"
State = dict[str, Any]


class Made:
    """The files in ``made/`` of one run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.run, self.folder = folder, folder / "made"
        # File -> its hash, size and time of change, as last read.
        self._hashed: dict[Path, State] = {}
        for file in sorted(self.folder.glob("*.json")):
            found = read_json(file)
            self._hashed.update({Path(state["path"]): state for state in found.get("inputs", {}).values()})
            self._hashed.update({folder / name: state for name, state in (found.get("outputs") or {}).items()})

    def read(self, step: Step) -> State | None:
        """What is known of a step; None when it has not begun."""
        file = self.folder / f"{step.name}.json"
        return read_json(file) if file.is_file() else None

    def is_done(self, step: Step) -> bool:
        """Whether the step has ended and what it made is there."""
        found = self.read(step)
        return found is not None and found["outputs"] is not None and not self._damaged(found)

    def _damaged(self, found: State) -> list[str]:
        """Outputs, from the run's folder on, that are missing or have changed."""
        return [name for name, state in found["outputs"].items() if self.hash_of(self.run / name) != state["sha256"]]

    def hash_of(self, file: Path) -> str | None:
        """The SHA-256 of a file, which is read only if it is not known; None where there is no file."""
        return str(self._state(file)["sha256"]) if file.is_file() else None

    def _state(self, file: Path) -> State:
        known, now = self._hashed.get(file), _stamp(file)
        if known is None or [known["bytes"], known["changed_ns"]] != now:
            known = {"sha256": sha256(file), "bytes": now[0], "changed_ns": now[1]}
            self._hashed[file] = known
        return known

    def hashes(self, folder: Path) -> dict[str, str]:
        """File in the folder -> SHA-256."""
        return {str(file.relative_to(folder)): self._state(file)["sha256"] for file in files_of(folder)}

    def _inputs(self, step: Step) -> dict[str, State]:
        """What a file is to the step -> its path, hash and stamp."""
        named = ((role, path, file) for role, path in step.inputs.items() for file in files_of(path))
        return {
            (role if file == path else f"{role}/{file.relative_to(path)}"): {"path": str(file), **self._state(file)}
            for role, path, file in named
        }

    def differences(self, step: Step, *, inputs: bool) -> list[str]:
        """What is not as it was when the step began, in words; empty for one that has not begun.

        Args:
            step: as it would be made now.
            inputs: look at the inputs' content too.
        """
        found = self.read(step)
        if found is None:
            return []
        now = {**step.settings, **step.digests}
        changed = [
            f"{key} was {_short(found['settings'].get(key))} and is {_short(now.get(key))}"
            for key in sorted({*found["settings"], *now})
            if found["settings"].get(key) != now.get(key)
        ]
        if inputs:
            before = {role: state["sha256"] for role, state in found["inputs"].items()}
            # What was cleared away to save space is no other input.
            differ = [(role, now) for role, now in self._inputs(step).items() if before.get(role) != now["sha256"]]
            changed += [f"{role} ({now['path']}) is not the file that it was" for role, now in differ[:3]]
            changed += [f"... and {len(differ) - 3} files more"] if len(differ) > 3 else []
        return changed

    def damage(self, step: Step) -> list[str]:
        """What has been changed, in words, of what a finished step made; a file that is gone is no change."""
        found = self.read(step)
        if found is None or found["outputs"] is None:
            return []
        changed = [self.run / name for name in self._damaged(found) if (self.run / name).is_file()]
        return [f"{path} was changed after it was made" for path in changed[:3]]

    def begin(self, step: Step) -> None:
        """Note what the step is made from, and clear away what an earlier try left if it cannot be gone on with.

        Raises:
            UmedError: something lies where the step will write, and nothing says what it was made from.
        """
        if self.read(step) is None:
            foreign = [str(path) for path in step.outputs if path.exists()]
            if foreign:
                raise UmedError(
                    f"{foreign[0]}: is there already, and {self.folder}/{step.name}.json, which would say what it was made "
                    "from, is not. Move it away, or choose another --out."
                )
        elif not step.resumable:
            self.forget(step)
        state = {
            "step": step.title,
            "command": list(step.command),
            "settings": {**step.settings, **step.digests},
            "inputs": self._inputs(step),
            "versions": versions(),
            "outputs": None,
        }
        write_json(self.folder / f"{step.name}.json", state)

    def end(self, step: Step) -> None:
        """Note that the step has ended, and what it made.

        Raises:
            UmedError: it made nothing.
        """
        found = self.read(step)
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing or found is None:
            raise UmedError(
                f"{step.title}: ended well, but {', '.join(missing)} is not there. Its command: {step.line()}"
            )
        files = [file for path in step.outputs for file in files_of(path)]
        outputs = {str(file.relative_to(self.run)): self._state(file) for file in files}
        write_json(self.folder / f"{step.name}.json", {**found, "outputs": outputs})

    def forget(self, step: Step) -> None:
        """Remove what the step has made, and then what is known of it."""
        for path in step.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.folder / f"{step.name}.json").unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
    """The file, or all files below a folder, but for the checkpoints that a trainer resumes from and for our manifest."""
    if path.is_file():
        return [path]
    inside = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    passed_over = ("checkpoint-", "tmp-checkpoint-", MANIFEST)
    return sorted(file for file in inside if not file.relative_to(path).parts[0].startswith(passed_over))


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def sha256(file: Path) -> str:
    """The file's SHA-256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Library -> version, of this environment."""
    found = {"python": sys.version.split()[0], "umed-plugin": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # LLaVA goes by two names, DeepSpeed may be absent
    return found


def read_json(file: Path) -> State:
    """A JSON object."""
    found: State = json.loads(file.read_text(encoding="utf-8"))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
