"""What an upgrade does, as commands: one `Step` for each, whose argument list is run and, by ``--dry-run``, printed.

Order: (the full checkpoint of a LoRA input,) records, evaluation of the input, stage 1, its checkpoint, evaluation, stage 2, its
checkpoint, evaluation. Each stage trains from a checkpoint in the input's own layout and number format, so that what stage 2
starts from, and is held to by its KL term, is what was evaluated.

A step is told apart from the same step with other settings by `Step.settings` and the content of `Step.inputs`; whatever stands
in its command must come from these.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.loading import READ_WHEN_ANSWERING, UMED_TEMPLATES, find_base, is_lora, read_config
from umed_plugin.checkpoints.merging import stock_name_fault
from umed_plugin.commands.upgrade.settings import Rewarding, Settings, Stage
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

EVALUATED = ("base", "instruction_tuning", "rewarding")
# Keys that every training depends on, beside those of its stage.
_OF_TRAINING = (
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
_OF_RECORDS = ("data_root", "seed", "box_decimals", "on_bad_image")
# LLaVA's finetune_task_lora.sh, where the settings have no key for it; `flags` may say otherwise.
_USUAL = {"lr_scheduler_type": "cosine", "weight_decay": 0.0, "logging_steps": 1, "report_to": "none"}
# Sampled answers with their rewards, for the report.
_USUAL_REWARDING = {"umed_log_candidates": 10}


@dataclass(frozen=True)
class Step:
    """One command of the upgrade.

    Attributes:
        name: of its log and of its file in ``made/``.
        title: for people.
        command: the argument list.
        settings: dotted key -> value of every setting that stands in the command.
        inputs: what a file or folder is to the step -> its path; it depends on their content.
        digests: what it depends on beside them -> its hash.
        outputs: files and folders that it makes; of a training the files beside the trainer's own checkpoints.
        resumable: what a try that was killed left behind is gone on with; otherwise it is removed.
        goal: its outputs are wanted for themselves; others are made only for a later step that has to run.
    """

    name: str
    title: str
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: tuple[Path, ...]
    resumable: bool = False
    goal: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it is one of the two trainings."""
        return self.name.startswith("stage_")

    def line(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(self.command)


@dataclass(frozen=True)
class Origin:
    """What is upgraded.

    Attributes:
        checkpoint: as given.
        full: the full checkpoint whose layout the result gets: ``checkpoint``, or the base of a LoRA checkpoint.
        config: how the model answers: ``config.json`` of ``full`` with what the adapter's training changed.
    """

    checkpoint: Path
    full: Path
    config: dict[str, Any]

    @property
    def lora(self) -> bool:
        """Whether an adapter is upgraded."""
        return self.full != self.checkpoint

    @property
    def image_mode(self) -> str:
        """How the model sees images that are not square; LLaVA takes what it does not know for square."""
        return str(self.config.get("image_aspect_ratio") or "square")

    @property
    def holds_tower(self) -> bool:
        """Whether the vision tower's folder lies inside, so that the result has to have one too."""
        tower = str(self.config.get("mm_vision_tower", ""))
        return os.path.isabs(tower) and Path(tower).resolve().is_relative_to(self.full.resolve())


def find_origin(checkpoint: Path, base: str | None) -> Origin:
    """Look at the input.

    Raises:
        UmedError: it is no checkpoint that LLaVA's training can start from.
    """
    if not is_lora(checkpoint):
        if base is not None:
            raise UmedError(f"base has no effect: {checkpoint} is a full checkpoint. Set it to null.")
        return Origin(checkpoint, checkpoint, read_config(checkpoint))
    trained, full = read_config(checkpoint), find_base(checkpoint, base)
    # As merging does it.
    answering = {key: trained[key] for key in READ_WHEN_ANSWERING if key in trained}
    return Origin(checkpoint, full, {**read_config(full), **answering})


def result_name(origin: Origin) -> str:
    """The result's folder name: the input's own with ``-umed`` where stock LLaVA would load that right."""
    kind = origin.config["model_type"]
    name = f"{origin.full.name}-umed"
    if stock_name_fault(name, kind) is None:
        return name
    return "llava-mistral-umed" if kind == "llava_mistral" else "llava-umed"


class Plan:
    """The steps of one run.

    Args:
        folder: of the run, absolute.
        settings: filled in.
        origin: what is upgraded.
    """

    def __init__(self, folder: Path, settings: Settings, origin: Origin) -> None:
        self.folder, self.settings, self.origin = folder, settings, origin
        self.flat = settings.flat()
        built = settings.recipe.endswith(".json")
        self.records = Path(settings.recipe) if built else folder / "data" / "records.json"
        self.start = self._in_runs("start") if origin.lora else origin.checkpoint
        self.tuned, self.result = self._in_runs("instruction_tuned"), folder / "checkpoint" / str(settings.name)

    def _in_runs(self, name: str) -> Path:
        kind = "llava-mistral" if self.origin.config["model_type"] == "llava_mistral" else "llava"
        return self.folder / "runs" / f"{name}-{kind}"

    def steps(self) -> list[Step]:
        """All steps in their order."""
        stages = (self.settings.instruction_tuning, self.settings.rewarding)
        names, sources, results = EVALUATED[1:], (self.start, self.tuned), (self.tuned, self.result)
        steps = [self._merged_start()] if self.origin.lora else []
        steps += [] if self.records == Path(self.settings.recipe) else [self._records()]
        steps.append(self._evaluation("base", self.start))
        for name, stage, source, result in zip(names, stages, sources, results):
            training = self._training(name, stage, source)
            steps += [training, self._checkpoint(name, training, source, result), self._evaluation(name, result)]
        return steps

    def _of(self, *keys: str) -> dict[str, Any]:
        """The settings of keys and of all keys below them."""
        return {
            dotted: value for dotted, value in self.flat.items() if dotted in keys or dotted.partition(".")[0] in keys
        }

    def _tower(self) -> dict[str, Path]:
        """The vision tower's folder, if it is one on this machine and no part of the input."""
        tower = str(self.origin.config.get("mm_vision_tower", ""))
        return {"vision tower": Path(tower)} if os.path.isabs(tower) and not self.origin.holds_tower else {}

    def _merged_start(self) -> Step:
        origin = self.origin
        command = (*umed(), "merge", origin.checkpoint, "--base", origin.full, "--out", self.start, "--overwrite")
        return Step(
            "start",
            "the full checkpoint of the LoRA input",
            _words(command),
            {},
            {"adapter": origin.checkpoint, "base": origin.full},
            (self.start,),
        )

    def _records(self) -> Step:
        settings = self.settings
        command: tuple[Any, ...] = (*umed(), "recipe", "build", settings.recipe, "--out", self.records)
        command += ("--image-aspect-ratio", self.origin.image_mode, "--box-decimals", settings.box_decimals)
        command += ("--seed", settings.seed, "--on-bad-image", settings.on_bad_image)
        command += ("--data-root", settings.data_root) if settings.data_root else ()
        recipe = load_recipe(settings.recipe)
        return Step(
            "records",
            f"records by recipe {recipe.name}",
            _words(command),
            {**self._of(*_OF_RECORDS), "image_aspect_ratio of the checkpoint": self.origin.image_mode},
            {},
            (self.records,),
            digests={f"recipe {recipe.name}": recipe.sha256},
        )

    def _evaluation(self, name: str, checkpoint: Path) -> Step:
        settings, out = self.settings.evaluation, self.folder / "evaluation" / name
        command: tuple[Any, ...] = (*umed(), "evaluate", checkpoint, "--benchmark", self.records, "--out", out)
        command += ("--batch-size", settings.batch_size, "--max-new-tokens", settings.max_new_tokens)
        command += ("--device", self.settings.device, *(("--limit", settings.limit) if settings.limit else ()))
        return Step(
            f"evaluation_{name}",
            f"evaluation: {name.replace('_', ' ')}",
            _words(command),
            self._of("evaluation", "device"),
            {"checkpoint": checkpoint, "records": self.records, **self._tower()},
            (out,),
            resumable=True,
            goal=True,
        )

    def _training(self, name: str, stage: Stage, source: Path) -> Step:
        output = self._in_runs(name)
        flags = training_flags(name, stage, self.settings, self.origin)
        places = {
            "model_name_or_path": source,
            "data_path": self.records,
            "image_folder": self.records.parent,
            "output_dir": output,
        }
        words = [word for flag, value in {**places, **flags}.items() for word in (f"--{flag}", value)]
        number = EVALUATED.index(name)
        inputs = {"checkpoint": source, "records": self.records, **self._tower()}
        inputs |= {"deepspeed": Path(self.settings.deepspeed)} if self.settings.deepspeed else {}
        return Step(
            f"stage_{number}_{name}",
            f"stage {number}: {name.replace('_', ' ')}",
            _words((*launcher(self.settings), *words)),
            {**self._of(*_OF_TRAINING, name), "deepspeed": self.settings.deepspeed is not None},
            inputs,
            (output,),
            resumable=True,
        )

    def _checkpoint(self, name: str, training: Step, source: Path, result: Path) -> Step:
        command = (*umed(), "merge", training.outputs[0], "--base", source, "--out", result, "--overwrite")
        # What lies in runs/ can go on using the tower inside the input; the result must not need the input's folder.
        tower = ("--with-tower",) if result == self.result and self.origin.holds_tower else ()
        return Step(
            f"checkpoint_{name}",
            f"checkpoint of {training.title}",
            _words((*command, *tower)),
            self._of("name") if result == self.result else {},
            {"trained": training.outputs[0], "base": source},
            (result,),
            goal=True,
        )


def training_flags(name: str, stage: Stage, settings: Settings, origin: Origin) -> dict[str, Any]:
    """LLaVA's and the plugin's flags of a stage, but for the paths of one run.

    Args:
        name: of the stage.
        stage: its settings.
        settings: all settings, filled in.
        origin: what is upgraded, whose configuration the training has to agree with.

    Raises:
        UmedError: ``flags`` holds one that the settings have a key for.
    """
    config = origin.config
    flags: dict[str, Any] = {
        "umed_stage": name,
        "version": UMED_TEMPLATES[config["model_type"]],
        "vision_tower": config.get("mm_vision_tower", config.get("vision_tower")),
        "mm_vision_select_layer": config.get("mm_vision_select_layer", -2),
        "mm_vision_select_feature": config.get("mm_vision_select_feature", "patch"),
        "mm_projector_type": config.get("mm_projector_type", "linear"),
        "mm_use_im_start_end": config.get("mm_use_im_start_end", False),
        "mm_use_im_patch_token": config.get("mm_use_im_patch_token", True),
        "image_aspect_ratio": origin.image_mode,
        "model_max_length": settings.model_max_length,
        "umed_on_bad_image": settings.on_bad_image,
        "learning_rate": stage.learning_rate,
        "mm_projector_lr": stage.projector_learning_rate,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.accumulation,
        "warmup_ratio": stage.warmup_ratio,
        "save_strategy": "steps",
        "save_steps": stage.save_steps,
        "save_total_limit": 1,
        "seed": settings.seed,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "dataloader_num_workers": 4 if settings.device == "cuda" else 0,
        "lazy_preprocess": True,
        **_number_format(settings),
        **_method(name, settings),
        "deepspeed": settings.deepspeed,
        **(_rewarding(stage) if isinstance(stage, Rewarding) else {}),
    }
    taken = sorted(set(stage.flags) & {*flags, "data_path", "image_folder", "output_dir", "model_name_or_path"})
    if taken:
        raise UmedError(
            f"{name}.flags: {', '.join(taken)} cannot be set there, as other settings of the run (or the checkpoint) say it."
        )
    usual = {**_USUAL, **(_USUAL_REWARDING if isinstance(stage, Rewarding) else {})}
    return {flag: value for flag, value in {**flags, **usual, **stage.flags}.items() if value is not None}


def _number_format(settings: Settings) -> dict[str, Any]:
    if settings.device == "cpu":
        return {"use_cpu": True, "bf16": settings.precision == "bf16"}
    bf16 = settings.precision == "bf16"
    return {"bf16": bf16, "fp16": settings.precision == "fp16", "tf32": bf16 or None}


def _method(name: str, settings: Settings) -> dict[str, Any]:
    if settings.method == "full":
        return {"lora_enable": False}
    lora = settings.lora
    # Stage 2 switches dropout off, whatever the flag says.
    dropout = lora.dropout if name == EVALUATED[1] else 0.0
    return {"lora_enable": True, "lora_r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": dropout}


def _rewarding(stage: Rewarding) -> dict[str, Any]:
    weights = stage.reward_weights
    return {
        "umed_algorithm": stage.algorithm,
        "umed_num_candidates": stage.candidates,
        "umed_rewards": ",".join(stage.rewards),
        "umed_reward_weights": ",".join(f"{weight:g}" for weight in weights) if weights else None,
        "umed_temperature": stage.temperature,
        "umed_max_new_tokens": stage.max_new_tokens,
    }


def launcher(settings: Settings) -> tuple[str, ...]:
    """How LLaVA's script is started: by Python, torchrun or DeepSpeed, under ``umed-run``."""
    processes = str(settings.processes)
    if settings.deepspeed is not None:
        started = [*_program("deepspeed", "deepspeed.launcher.runner"), "--num_gpus", processes]
        return (*_umed_run(), *started, "--master_port", str(settings.master_port), _script())
    if settings.device == "cpu" and settings.processes == 1:
        return (*_umed_run(), sys.executable, "-m", "llava.train.train_mem")
    # One process too: transformers would spread a plain Python over all GPUs that it sees. Not --standalone: before torch 2.1 it
    # takes one fixed port, and two runs at a time would meet there.
    started = [*_program("torchrun", "torch.distributed.run"), "--rdzv_backend", "c10d"]
    started += ["--rdzv_endpoint", "localhost:0", "--nproc_per_node", processes]
    return (*_umed_run(), *started, "-m", "llava.train.train_mem")


def umed() -> list[str]:
    """How ``umed`` is started."""
    return _program("umed", "umed_plugin.cli")


def _umed_run() -> list[str]:
    return _program("umed-run", "umed_plugin.launch")


def _program(name: str, module: str) -> list[str]:
    """A program of this Python's environment, by its path: another one on PATH would be another environment's."""
    beside = Path(sys.executable).parent / name
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", module]


def _script() -> str:
    found = find_spec("llava")
    if found is None or found.origin is None:
        raise UmedError("LLaVA is not installed in this environment (no module llava). Install LLaVA 1.2.2 first.")
    return str(Path(found.origin).parent / "train" / "train_mem.py")


def _words(command: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(word) for word in command)
