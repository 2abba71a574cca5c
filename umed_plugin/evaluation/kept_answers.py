"""Answers on disk as they come: JSON lines in a folder, with the settings under which they were given.

After a crash, even ``kill -9``, the same command continues behind the last complete batch. Its lines are on the disk before the
next batch begins. A line that was cut off is dropped, and so are the lines of an incomplete batch, which is asked again as it was
the first time. The answers are those of an undisturbed run.

Several processes may share the questions. Each writes a file of its own (``predictions.shard-1-of-4.jsonl``) and reads those of
the others, so answers also count when the number of processes changes.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from umed_plugin import files
from umed_plugin.data.shards import Shard
from umed_plugin.errors import UmedError

SETTINGS = "settings.json"


class KeptAnswers:
    """The lines of a file, by the question's id.

    Args:
        folder: made if need be.
        name: of the file in it.
        settings: all that the answers depend on. Those of an earlier run in the folder must be the same.
        key: field of a line that holds the question's id.
        shard: the share of this process; None: it asks all questions.
        changes: settings that are hashes, such as ``weights`` or ``questions.texts`` -> what to say when they differ.

    Attributes:
        lines: of this process's file.

    Raises:
        UmedError: the folder holds answers given under other settings, or lines that are not JSON.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        settings: Mapping[str, Any],
        key: str = "id",
        shard: Shard | None = None,
        changes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._joined, self._key, self.shard = Path(folder) / name, key, shard
        self.path = self._joined if shard is None else self._shard_file(shard)
        Path(folder).mkdir(parents=True, exist_ok=True)
        answers = [file for file in (self._joined, *self._shard_files()) if file.exists()]
        _check_settings(Path(folder) / SETTINGS, json.loads(json.dumps(settings)), answers, changes)
        self.lines: dict[str, dict[str, Any]] = self._read(self.path)

    def _shard_file(self, shard: Shard) -> Path:
        return self._joined.with_name(f"{self._joined.stem}.{shard.file_part}{self._joined.suffix}")

    def _shard_files(self) -> list[Path]:
        return sorted(self._joined.parent.glob(f"{glob.escape(self._joined.stem)}.shard-*{self._joined.suffix}"))

    def of_others(self) -> dict[str, dict[str, Any]]:
        """Lines of all other processes' files as they are now, and of the joined file, by the question's id."""
        lines: dict[str, dict[str, Any]] = {}
        # The joined file last: whoever joins writes it, and only then removes the others.
        for file in (*self._shard_files(), self._joined):
            if file != self.path:
                lines.update(self._read(file))
        return lines

    def remove_shards(self) -> None:
        """Remove the files of all processes, once the joined file holds their lines."""
        for file in self._shard_files():
            file.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        lines = []
        # What stands behind the last newline was cut off.
        for number, text in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                lines.append(files.parse_json(text))
            except ValueError as error:
                raise UmedError(
                    f"{path}: line {number} is not JSON ({error}). It was damaged after it was written: remove the file to "
                    "ask everything again."
                ) from error
            if not isinstance(lines[-1], dict) or not isinstance(lines[-1].get(self._key), (str, int)):
                raise UmedError(
                    f"{path}: line {number} is not an object with the key {self._key!r}. It was damaged after it was written: "
                    "remove the file to ask everything again."
                )
        return {str(line[self._key]): line for line in lines}

    def keep_only(self, ids: Iterable[str]) -> None:
        """Forget all lines but those of ``ids``, on the disk too."""
        wanted = set(ids)
        self.lines = {identity: line for identity, line in self.lines.items() if identity in wanted}
        files.write_json_lines(self.path, self.lines.values())

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append the lines of a batch; they are on the disk when this returns."""
        files.append_json_lines(self.path, lines)
        self.lines.update({str(line[self._key]): line for line in lines})


def _check_settings(file: Path, settings: dict[str, Any], answers: Sequence[Path], changes: Mapping[str, str]) -> None:
    if answers and not file.exists():
        raise UmedError(
            f"{answers[0]} exists, but no {SETTINGS} that says under which settings its answers were given. "
            "Give another --out, or remove that file."
        )
    if answers:
        differences = _differences(files.read_object(file), settings, changes)
        if differences:
            told = "\n".join(f"  {line}" for line in differences)
            raise UmedError(
                f"{file.parent} holds answers that were given under other settings:\n{told}\n"
                "Give another --out, or remove that folder."
            )
    files.write_json(file, settings)


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any], changes: Mapping[str, str]) -> list[str]:
    """What differs, a line each; a hash is explained."""
    groups = [name for name, value in now.items() if isinstance(value, dict)]
    if not all(isinstance(earlier.get(name, {}), dict) for name in groups):
        return ["an earlier version of umed-plugin wrote them, which noted less of what they depend on"]
    lines = []
    for group in ("", *groups):
        before, after = (_flat(settings, group) for settings in (earlier, now))
        changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        plain = [_changed(name, before.get(name), after.get(name)) for name in changed if name not in changes]
        explained = [f"{_last(name)}: {changes[name]}" for name in changed if name in changes]
        # The hashes of a group follow from what stands in it plainly: another limit asks other questions.
        lines += plain if group and plain else [*plain, *explained]
    return lines


def _flat(settings: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The settings of a group by their dotted names; of no group, those that are no group."""
    if group:
        return {f"{group}.{name}": value for name, value in settings.get(group, {}).items()}
    return {name: value for name, value in settings.items() if not isinstance(value, dict)}


def _changed(name: str, before: Any, after: Any) -> str:
    there, now = ("none" if value is None else repr(value) for value in (before, after))
    return f"{_last(name)}: {there} there, {now} now"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
