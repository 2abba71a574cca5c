"""The files and checkpoints that a stage's settings name, such as a teacher: a training depends on what they hold."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from umed_plugin.checkpoints.folder import weight_files
from umed_plugin.commands.upgrade.settings import Rewarding, Settings, Stage
from umed_plugin.data.recipes.recipe import load_recipe, sources_of
from umed_plugin.errors import UmedError
from umed_plugin.flags.names import REPLAY, SYMBOLIC
from umed_plugin.flags.rules import FREE
from umed_plugin.training.run_settings import kind_of

_WITH_FILE = (f"{SYMBOLIC}:", f"{REPLAY}:")  # beginnings of a value whose rest is a file


def named_files(name: str, stage: Stage, settings: Settings) -> dict[str, Path]:
    """Setting -> the file that it names, by absolute path, if there is one; of a checkpoint, ``SETTING/NAME`` -> each file.

    Of a checkpoint they are ``config.json`` and the weights, as the training itself compares them. Flags on which nothing
    depends, such as a cache, are left out. So are folders without a ``config.json``, which are data: they may hold millions of
    images.

    Args:
        name: of the stage.
        stage: its settings.
        settings: all settings.
    """
    values: dict[str, object] = {"deepspeed": settings.deepspeed}
    values |= {f"{name}.flags.{flag}": value for flag, value in stage.flags.items() if kind_of(flag) != FREE}
    if isinstance(stage, Rewarding):
        values |= {f"{name}.rewards[{number}]": reward for number, reward in enumerate(stage.rewards)}
    texts = {setting: value for setting, value in values.items() if isinstance(value, str) and value}
    found = {setting: Path(os.path.abspath(_without_kind(value))) for setting, value in texts.items()}
    counted = {role: file for setting, path in found.items() for role, file in _counted(setting, path).items()}
    return counted | _of_recipe(f"{name}.flags.umed_recipe", stage.flags.get("umed_recipe"))


def _counted(setting: str, path: Path) -> dict[str, Path]:
    """The file; of a checkpoint, its ``config.json`` and its weights. Nothing for other values, such as a long JSON."""
    if os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        return {setting: path}
    if not os.path.isfile(path / "config.json"):
        return {}
    found = [path / "config.json"]
    with suppress(UmedError):  # without weights, which the training will say
        found += weight_files(path)
    return {f"{setting}/{file.name}": file for file in found}


def _without_kind(value: str) -> str:
    """The file of ``symbolic:FILE`` or ``replay:FILE``; any other value unchanged."""
    return value.partition(":")[2] if value.startswith(_WITH_FILE) else value


def _of_recipe(setting: str, recipe: object) -> dict[str, Path]:
    """The YAML of a recipe, and those of a mixture's sources; nothing where it has faults, which the training will say."""
    if recipe is None:
        return {}
    with suppress(UmedError):
        loaded = load_recipe(str(recipe))
        files = dict.fromkeys([loaded.path, *(source.path for source in sources_of(loaded))])
        return {f"{setting} {Path(file).name}": Path(os.path.abspath(file)) for file in files}
    return {}
