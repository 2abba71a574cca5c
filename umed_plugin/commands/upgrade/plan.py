"""The commands of an upgrade: one `Step` each, whose argument list is run or, with ``--dry-run``, printed.

Order: (the full checkpoint of a LoRA input,) records, evaluation of the input, stage 1, its checkpoint, evaluation, stage 2, its
checkpoint, evaluation. Each stage trains from a checkpoint in the input's own layout and dtypes. So the model that stage 2
starts from, and its KL term refers to, is the model that was evaluated.

With ``rewarding: auto`` a trial of stage 2 comes after stage 1's evaluation, and then either stage 2 or the end: `Plan.goes_on`.
Trainings answer held-out records every ``save_steps`` steps where the records have a split ``val``. That changes nothing of what
they train, so it is not among a step's settings.

`Step.settings` and the content of `Step.inputs` and `Step.files` identify a step: every setting in its command must be among
them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Optional

from umed_plugin import __version__
from umed_plugin.commands.upgrade.held_out import HeldOut
from umed_plugin.commands.upgrade.named_files import named_files
from umed_plugin.commands.upgrade.origin import Origin
from umed_plugin.commands.upgrade.settings import RUN_FILE, Settings, Stage
from umed_plugin.commands.upgrade.training import launcher, program, training_flags, trial_flags, unchecked_start
from umed_plugin.data.prepared import has_pseudo_boxes
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError
from umed_plugin.flags.rules import REWARDING, STAGES, TUNING

# Settings that both trainings depend on, besides those of their stage.
_TRAINING_KEYS = (
    "seed",
    "on_bad_image",
    "model_max_length",
    "device",
    "precision",
    "processes",
    "master_port",
    "method",
    "lora",
    "gradient_checkpointing",
)
_RECORDS_KEYS = ("data_root", "seed", "box_decimals", "on_bad_image")


@dataclass(frozen=True)
class Step:
    """One command of the upgrade.

    Attributes:
        name: of its log and of its file in ``made/``.
        title: shown to the user.
        command: the argument list.
        settings: dotted key -> value of every setting in the command.
        inputs: role of a file or folder in the step -> its path; the step depends on the content.
        outputs: the files and folders it makes; a training's outputs exclude the trainer's own checkpoints.
        resumable: continue from what a killed attempt left behind; otherwise remove that first.
        goal: its outputs are wanted for themselves; other steps run only if a later step that has to run needs them.
        files: setting -> the file or the checkpoint's folder that it names; the step depends on the content, as on the setting.
        digests: further dependencies -> their hash.
        stamps: gives those that may be missing, such as data on a disk that is not mounted -> their hash. It may take as long as
            reading them, so it is called only when a step is compared or begins.
    """

    name: str
    title: str
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: tuple[Path, ...]
    resumable: bool = False
    goal: bool = False
    files: Mapping[str, Path] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    stamps: Callable[[], Mapping[str, str]] = dict

    @property
    def trains(self) -> bool:
        """Whether it is one of the two trainings, or the trial of the second."""
        return self.name.startswith(("stage_", "trial_of_"))

    def line(self) -> str:
        """The command as one shell line."""
        return shlex.join(self.command)


class Plan:
    """The steps of one run.

    Args:
        folder: of the run, absolute.
        settings: filled in.
        origin: the checkpoint to upgrade.

    Attributes:
        goes_on: whether stage 2 follows the trial of ``rewarding: auto``; None while it has not decided, and without it.
    """

    goes_on: Optional[bool] = None

    def __init__(self, folder: Path, settings: Settings, origin: Origin) -> None:
        self.folder, self.settings, self.origin = folder, settings, origin
        self.flat = settings.flat()
        self.builds_records = not settings.recipe.endswith(".json")
        self.records = folder / "data" / "records.json" if self.builds_records else Path(settings.recipe)
        self.start = self._in_runs("start") if origin.lora else origin.checkpoint
        self.tuned, self.result = self._in_runs("instruction_tuned"), folder / "checkpoint" / str(settings.name)
        self.tried = self._in_runs("tried")
        self.held_out = HeldOut(settings, self.records)
        self._data_stamps = cache(_stamps_of_data)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The stages whose checkpoints are evaluated: without stage 2, if it is not run or its trial ended the run."""
        return ("base", *(STAGES[:1] if self.goes_on is False else self.settings.stages))

    def _in_runs(self, name: str) -> Path:
        family = "llava-mistral" if self.origin.config["model_type"] == "llava_mistral" else "llava"
        return self.folder / "runs" / f"{name}-{family}"

    def steps(self) -> list[Step]:
        """All steps in their order."""
        steps = [self._merged_start()] if self.origin.lora else []
        steps += [self._records()] if self.builds_records else []
        test = self.settings.evaluation.recipe
        steps.append(self._evaluation("base", self.start, test))
        tuning = self._training(TUNING, self.settings.instruction_tuning, self.start)
        steps += [
            tuning,
            self._checkpoint(TUNING, tuning, self.start, self.tuned),
            self._evaluation(TUNING, self.tuned, test),
        ]
        steps += self.trial() if self.settings.rewarding.run == "auto" else []
        if self.goes_on is False or REWARDING not in self.settings.stages:
            return [*steps, self._checkpoint(REWARDING, tuning, self.start, self.result)]
        stage = self.settings.rewarding
        flags = unchecked_start(stage) if stage.run == "auto" else {}  # the trial has decided
        stage = stage.model_copy(update={"flags": {**flags, **stage.flags}})
        rewarding = self._training(REWARDING, stage, self.tuned)
        result = self._checkpoint(REWARDING, rewarding, self.tuned, self.result)
        return [*steps, rewarding, result, self._evaluation(REWARDING, self.result, test)]

    def trial(self) -> list[Step]:
        """The steps of ``rewarding: auto``: a short stage 2, its checkpoint, evaluations of the split val before and after it.

        Which records' split val that is, `umed_plugin.commands.upgrade.held_out` says.
        """
        stage = self.settings.rewarding
        # Logged at each step whatever stage 2 logs: two of the decision's three tests read the log.
        flags = {"umed_log_candidates": 0, "umed_val_records": 256, **stage.flags, **trial_flags(stage)}
        short = stage.model_copy(update={"steps": stage.trial_steps, "epochs": None, "flags": flags})
        training = self._training(REWARDING, short, self.tuned, trial=True)
        checkpoint = self._checkpoint("trial", training, self.tuned, self.tried)
        before, after = (
            self._evaluation(f"trial_{name}", path, self.held_out.recipe(), "val")
            for name, path in (("before", self.tuned), ("after", self.tried))
        )
        return [training, replace(checkpoint, goal=False), before, after]

    def longer_stage_1(self) -> str:
        """The command that trains stage 1 twice as long and no stage 2, in a folder beside this run's."""
        tuning = self.settings.instruction_tuning
        key, length = ("epochs", tuning.epochs) if tuning.epochs is not None else ("steps", tuning.steps)
        changes = {"rewarding": "never", f"instruction_tuning.{key}": f"{2 * (length or 0):g}"}
        # Without stage 2 nothing would train on the other labels, and this run's input is not to be swapped by a second one.
        changes |= {"label_share": "null"} if self.settings.label_share is not None else {}
        changes |= {"in_place": "false"} if self.settings.in_place else {}
        sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        out = self.folder.with_name(f"{self.folder.name}-longer")
        return shlex.join(["umed", "upgrade", "--config", str(self.folder / RUN_FILE), "--out", str(out), *sets])

    def _settings(self, *keys: str) -> dict[str, Any]:
        """Dotted key -> value of these keys and of all keys below them."""
        return {
            dotted: value for dotted, value in self.flat.items() if dotted in keys or dotted.partition(".")[0] in keys
        }

    def _tower(self) -> dict[str, Path]:
        """The vision tower's folder, if it is on this machine and outside the input."""
        tower = str(self.origin.config.get("mm_vision_tower", ""))
        return {"vision tower": Path(tower)} if os.path.isabs(tower) and not self.origin.holds_tower else {}

    def _merged_start(self) -> Step:
        origin = self.origin
        command = (*umed(), "merge", origin.checkpoint, "--base", origin.full, "--out", self.start, "--overwrite")
        return Step(
            name="start",
            title="the full checkpoint of the LoRA input",
            command=_words(command),
            settings={},
            inputs={"adapter": origin.checkpoint, "base": origin.full},
            outputs=(self.start,),
        )

    def _records(self) -> Step:
        settings = self.settings
        command: tuple[Any, ...] = (*umed(), "recipe", "build", settings.recipe, "--out", self.records)
        command += ("--image-aspect-ratio", self.origin.image_mode, "--box-decimals", settings.box_decimals)
        command += ("--seed", settings.seed, "--on-bad-image", settings.on_bad_image)
        command += ("--data-root", settings.data_root) if settings.data_root else ()
        recipe = load_recipe(settings.recipe)
        pseudo = has_pseudo_boxes(recipe)
        command += ("--tower", self.start) if pseudo else ()
        return Step(
            name="records",
            title=f"records by recipe {recipe.name}",
            command=_words(command),
            settings={**self._settings(*_RECORDS_KEYS), "image_aspect_ratio of the checkpoint": self.origin.image_mode},
            inputs={"checkpoint": self.start, **self._tower()} if pseudo else {},
            outputs=(self.records,),
            digests={f"recipe {recipe.name}": recipe.sha256},
            stamps=partial(self._data_stamps, settings.recipe, settings.data_root),
        )

    def _evaluation(self, name: str, checkpoint: Path, own: str | None, split: str | None = None) -> Step:
        """The evaluation on ``own``, a recipe or records; None: on the records that are trained on."""
        # The report shows what is in evaluation/: the stages, on the test.
        settings, out = self.settings.evaluation, self.folder / ("evaluation" if split is None else "trial") / name
        benchmark = own or self.records
        command: tuple[Any, ...] = (*umed(), "evaluate", checkpoint, "--benchmark", benchmark, "--out", out)
        command += ("--data-root", settings.data_root) if own and settings.data_root else ()
        command += ("--batch-size", settings.batch_size, "--max-new-tokens", settings.max_new_tokens)
        command += ("--device", self.settings.device, *(("--limit", settings.limit) if settings.limit else ()))
        command += ("--split", split) if split is not None else ()
        command += ("--on-bad-image", "skip") if self.settings.on_bad_image == "skip" else ()
        measured_on: dict[str, Path] = {"records": Path(benchmark)}
        digests: dict[str, str] = {}
        stamps: Callable[[], Mapping[str, str]] = dict
        if not str(benchmark).endswith(".json"):
            recipe = load_recipe(str(benchmark))
            measured_on, digests = {}, {f"recipe {recipe.name}": recipe.sha256}
            stamps = partial(self._data_stamps, str(benchmark), settings.data_root)
        return Step(
            name=f"evaluation_{name}",
            title=f"evaluation: {name.replace('_', ' ')}",
            command=_words(command),
            # Runs begun before these keys existed lack them.
            settings={
                key: value
                for key, value in self._settings("evaluation", "device").items()
                if key not in ("evaluation.recipe", "evaluation.data_root") or (own and value is not None)
            },
            inputs={"checkpoint": checkpoint, **measured_on, **self._tower()},
            outputs=(out,),
            resumable=True,
            goal=True,
            digests=digests,
            stamps=stamps,
        )

    def flags_if_val(self) -> Optional[str]:
        """What the trainings add if the records have a split val, for a dry run; None once they are built, and that is known."""
        if self.held_out.has_val_if_built() is not None:
            return None
        stages = {name: getattr(self.settings, name) for name in self.settings.stages}
        added = [
            f"--umed_val_every {stage.save_steps} to {name.replace('_', ' ')}"
            for name, stage in stages.items()
            if "umed_val_every" not in stage.flags
        ]
        return " and ".join(added) or None

    def _training(self, name: str, stage: Stage, source: Path, *, trial: bool = False) -> Step:
        output = self._in_runs("trial" if trial else name)
        paths = {
            "model_name_or_path": source,
            "data_path": self.records,
            "image_folder": self.records.parent,
            "output_dir": output,
        }
        flags = {**paths, **training_flags(name, stage, self.settings, self.origin, validated=self.held_out.has_val())}
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        number = 1 + STAGES.index(name)
        # Runs begun before these keys existed lack them.
        newer = {"bits": 16, "augment": False, "label_share": None}
        keys = (*_TRAINING_KEYS, *(key for key, usual in newer.items() if getattr(self.settings, key) != usual))
        return Step(
            name="trial_of_rewarding" if trial else f"stage_{number}_{name}",
            title=f"{'trial of ' if trial else ''}stage {number}: {name.replace('_', ' ')}",
            command=_words((*launcher(self.settings), *words)),
            settings={**self._of_stage(keys, name, trial), "deepspeed": self.settings.deepspeed is not None},
            inputs={"checkpoint": source, "records": self.records, **self._tower()},
            files=named_files(name, stage, self.settings),
            outputs=(output,),
            resumable=True,
        )

    def _of_stage(self, keys: tuple[str, ...], name: str, trial: bool) -> dict[str, Any]:
        """The settings that a training depends on; the trial alone depends on its own length, and not on stage 2's."""
        own = self._settings(*keys, name)
        lengths = ("rewarding.steps", "rewarding.epochs") if trial else ("rewarding.trial_steps",)
        others = {*lengths, "rewarding.run", "rewarding.when_unsure"}
        return {key: value for key, value in own.items() if key not in others}

    def _checkpoint(self, name: str, training: Step, source: Path, result: Path) -> Step:
        command = (*umed(), "merge", training.outputs[0], "--base", source, "--out", result, "--overwrite")
        # Checkpoints in runs/ may use the tower inside the input's folder; the result must not depend on that folder.
        tower = ("--with-tower",) if result == self.result and self.origin.holds_tower else ()
        return Step(
            name=f"checkpoint_{name}",
            title=f"checkpoint of {training.title}",
            command=_words((*command, *tower)),
            settings=self._settings("name") if result == self.result else {},
            inputs={"trained": training.outputs[0], "base": source},
            outputs=(result,),
            goal=True,
        )


def _stamps_of_data(recipe: str, data_root: str | None) -> dict[str, str]:
    """The data that records are built from, or an evaluation asks about, if they are on this machine -> their stamp.

    Folder and release are in the name: a stamp holds paths, and another release may read the same data otherwise.
    """
    from umed_plugin.data.annotations import read_annotations
    from umed_plugin.data.data_stamp import data_stamp

    with contextlib.suppress(UmedError, OSError):
        annotations = read_annotations(load_recipe(recipe), data_root)
        if annotations.items:  # none: the folder is there, but the disk below it is not
            stamp = data_stamp(annotations)
            return {f"data in {stamp['data_root']}, read by umed-plugin {__version__}": stamp["data_sha256"]}
    return {}


def umed() -> list[str]:
    """The command that starts ``umed``."""
    return program("umed", "umed_plugin.cli")


def _words(command: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(word) for word in command)
