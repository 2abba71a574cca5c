"""The settings of an upgrade: one YAML file that lists all of them and can be edited.

The first start fills in what depends on the machine and the checkpoint: device, precision, processes, learning rates, the
result's name. So a later start on another machine does not silently continue with other values. The defaults are for 7 billion
parameters on GPUs with 80 GB: LoRA of rank 128 as in LLaVA's ``finetune_task_lora.sh``, in bfloat16 with gradient checkpointing.
The paper (arXiv 2501.01377) publishes no hyper-parameters.

How to run: ``umed upgrade --config DIR/run.yaml``, with ``--set KEY=VALUE`` for any key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import yaml
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from umed_plugin import files
from umed_plugin.commands.machine import Machine
from umed_plugin.commands.numbers import MOST_SEED
from umed_plugin.faults import StrictModel
from umed_plugin.flags.names import PAPER_REWARDS
from umed_plugin.flags.rules import STAGES

RUN_FILE = "run.yaml"
FlagValue = Union[bool, int, float, str]
_WITH_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
# Chosen by the first start, by method. Stage 1: as in LLaVA's scripts. Stage 2: LLaVA-RLHF's PPO for LoRA, for full fine-tuning
# a twentieth of stage 1's.
_LEARNING_RATES = {"instruction_tuning": {"lora": 2e-4, "full": 2e-5}, "rewarding": {"lora": 3e-5, "full": 1e-6}}


def _key(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


def _numbers_in_text(flags: Any) -> Any:
    """Flags with the numbers that YAML reads as text, such as 2e-6: without a point it knows no exponent."""
    if not isinstance(flags, dict):
        return flags
    return {
        name: float(value) if isinstance(value, str) and _WITH_EXPONENT.fullmatch(value) else value
        for name, value in flags.items()
    }


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted key -> value; ``flags`` stay one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "flags"
        flat.update(dotted(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


class Lora(StrictModel):
    """The adapter of ``method: lora``."""

    r: int = _key(128, "Rank.", ge=1)
    alpha: int = _key(256, "Scale: the adapter is multiplied by alpha / r.", ge=1)
    dropout: float = _key(0.05, "Dropout on the adapter's input, in stage 1.", ge=0, lt=1)
    targets: Optional[list[str]] = _key(
        None, "Linear layers that get the adapter, such as [q_proj, v_proj]; null: all.", min_length=1
    )


class Stage(StrictModel):
    """Settings of both stages."""

    learning_rate: Optional[float] = _key(None, "Learning rate of the language model, or of its adapter.", gt=0)
    projector_learning_rate: Optional[float] = _key(2e-5, "Learning rate of the projector; null: learning_rate.", gt=0)
    epochs: Optional[float] = _key(None, "Epochs over the records; null: use steps.", gt=0)
    steps: Optional[int] = _key(None, "Optimizer steps; null: use epochs.", ge=1)
    batch_size: int = _key(8, "Batch size per process, in records (stage 2: questions).", ge=1)
    accumulation: int = _key(1, "Gradient accumulation: batches per process and optimizer step.", ge=1)
    warmup_ratio: float = _key(0.03, "Share of the steps in which the learning rate warms up.", ge=0, le=1)
    save_steps: int = _key(50, "Save a checkpoint to resume from every this many steps.", ge=1)
    flags: Annotated[dict[str, FlagValue], BeforeValidator(_numbers_in_text)] = _key(
        {}, "Further flags of LLaVA's script or the plugin, without dashes: {report_to: tensorboard}."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Any:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("set one of epochs and steps, and the other to null")
        return self


class InstructionTuning(Stage):
    """Stage 1: Abnormal-Aware Instruction Tuning."""

    epochs: Optional[float] = _key(3, "Epochs over the records; null: use steps.", gt=0)
    accumulation: int = _key(2, "Gradient accumulation: batches per process and optimizer step.", ge=1)


class Rewarding(Stage):
    """Stage 2: Abnormal-Aware Rewarding."""

    run: Literal["always", "auto", "never"] = _key(
        "always",
        "always; auto: only if a trial says on held-out studies (split val) that it pays; or never. Without stage 2 the result "
        "is stage 1's. `rewarding: auto` and `rewarding: never` are short for it.",
    )
    trial_steps: int = _key(40, "Optimizer steps of the trial of run: auto.", ge=1)
    when_unsure: Literal["leave_out", "start"] = _key(
        "leave_out",
        "What run: auto does where the trial cannot tell whether stage 2 pays: leave_out ends with stage 1, start goes on.",
    )
    steps: Optional[int] = _key(200, "Optimizer steps; null: use epochs.", ge=1)
    batch_size: int = _key(4, "Batch size per process, in questions.", ge=1)
    accumulation: int = _key(2, "Gradient accumulation: batches per process and optimizer step.", ge=1)
    save_steps: int = _key(20, "Save a checkpoint to resume from every this many steps.", ge=1)
    algorithm: Literal["grpo", "ppo"] = _key("grpo", "grpo or ppo.")
    candidates: int = _key(8, "Answers sampled per question (K).", ge=1)
    rewards: list[str] = _key(list(PAPER_REWARDS), "Rewards, as for --umed_rewards.", min_length=1)
    reward_weights: Optional[list[Union[float, str]]] = _key(
        None, "One weight per reward, or 0..1 for one that rises over the run; null: 1 each."
    )
    temperature: float = _key(1.0, "Sampling temperature.", gt=0)
    max_new_tokens: int = _key(128, "Maximum length of a sampled answer, in tokens.", ge=1)


def _short_form(value: Any) -> Any:
    return {"run": value} if isinstance(value, str) else value


class Evaluation(StrictModel):
    """Evaluation of the input and after each stage, on the records of the split ``test``."""

    recipe: Optional[str] = _key(
        None, "Recipe or records (JSON) to evaluate on, with true boxes; null: those that are trained on."
    )
    data_root: Optional[str] = _key(None, "Folder of that recipe's data set; null: the recipe's own.")
    limit: Optional[int] = _key(None, "Only the first this many records; null: all.", ge=1)
    batch_size: int = _key(16, "Batch size, in studies.", ge=1)
    max_new_tokens: int = _key(128, "Maximum length of an answer, in tokens.", ge=1)


class Settings(StrictModel):
    """Everything that a run depends on. Relative paths are relative to the file's folder."""

    checkpoint: str = _key(
        ..., "The checkpoint to upgrade: a folder, full or LoRA. It is not changed, except at the end with in_place."
    )
    base: Optional[str] = _key(None, "Base of a LoRA checkpoint; null: the one its adapter names.")
    recipe: str = _key(
        ..., "Name of a shipped recipe, a recipe's YAML file, or records that `umed recipe build` wrote (JSON)."
    )
    data_root: Optional[str] = _key(None, "Folder of the recipe's data set; null: the recipe's own.")
    name: Optional[str] = _key(None, "Name of the result's folder, below checkpoint/.", pattern=r"^[A-Za-z0-9_.-]+$")
    accept_findings: list[str] = _key([], "Codes of `umed doctor` errors to accept.")
    in_place: bool = _key(
        False, "At the very end, put the result in the checkpoint's place and keep the old one beside it."
    )
    seed: int = _key(0, "Seed of wording, order and sampling.", ge=0, le=MOST_SEED)
    augment: bool = _key(False, "Augment the training studies in both stages, as the recipe's augment says.")
    label_share: Optional[float] = _key(
        None,
        "Share of the labelled studies that stage 1 trains on, stage 2 on the others, by patient; null: both on all.",
        gt=0,
        lt=1,
    )
    box_decimals: Literal[2, 3] = _key(2, "Decimals of box coordinates in text.")
    on_bad_image: Literal["stop", "skip"] = _key("stop", "stop, or skip: leave out images that cannot be read.")
    model_max_length: Optional[int] = _key(None, "Maximum sequence length in training, in tokens.", ge=64)
    device: Optional[Literal["cuda", "cpu"]] = _key(None, "cuda or cpu.")
    precision: Optional[Literal["bf16", "fp16", "fp32"]] = _key(None, "Precision of training: bf16, fp16 or fp32.")
    processes: Optional[int] = _key(None, "Training processes, one per GPU.", ge=1)
    deepspeed: Optional[str] = _key(None, "DeepSpeed configuration (JSON); null: no DeepSpeed.")
    master_port: int = _key(0, "Port of the rendezvous of a stage's processes; 0: any that is free.", ge=0, le=65535)
    method: Literal["lora", "full"] = _key("lora", "lora, or full: full fine-tuning.")
    bits: Literal[16, 4] = _key(
        16, "Bits of the frozen weights under the adapter: 16, or 4 (QLoRA), which needs bitsandbytes and less memory."
    )
    lora: Lora = Lora()
    gradient_checkpointing: Optional[bool] = _key(None, "Recompute activations: less memory, more time.")
    instruction_tuning: InstructionTuning = InstructionTuning()
    rewarding: Annotated[Rewarding, BeforeValidator(_short_form)] = Rewarding()
    evaluation: Evaluation = Evaluation()

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are trained, in their order."""
        return STAGES[:1] if self.rewarding.run == "never" else STAGES

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value."""
        return dotted(self.model_dump())


def filled_in(settings: Settings, config: dict[str, Any], name: str, machine: Machine) -> Settings:
    """Fill in the settings that depend on machine or checkpoint and are still null.

    Args:
        settings: as read.
        config: ``config.json`` of the checkpoint, or of a LoRA checkpoint's base.
        name: default name of the result's folder.
        machine: that the run is for.
    """
    device = settings.device or ("cuda" if machine.gpus else "cpu")
    gpu = device == "cuda"
    defaults = {
        "name": name,
        "model_max_length": config.get("tokenizer_model_max_length") or 2048,
        "device": device,
        "precision": machine.precision if gpu else "fp32",
        "processes": max(1, machine.gpus) if gpu else 1,
        "gradient_checkpointing": gpu,
    }
    update: dict[str, Any] = {key: value for key, value in defaults.items() if getattr(settings, key) is None}
    for stage, rates in _LEARNING_RATES.items():
        if getattr(settings, stage).learning_rate is None:
            rate = {"learning_rate": rates[settings.method]}
            update[stage] = getattr(settings, stage).model_copy(update=rate)
    return settings.model_copy(update=update)


def as_yaml(settings: BaseModel, indent: str = "") -> str:
    """The settings as YAML, each key below a comment with its meaning."""
    lines = []
    fields = type(settings).model_fields
    for key in sorted(fields, key=lambda key: key == "flags"):
        field, value = fields[key], getattr(settings, key)
        if isinstance(value, BaseModel):
            meaning = (type(value).__doc__ or "").splitlines()[0].replace("``", "")
            lines += ["", f"{indent}# {meaning}", f"{indent}{key}:"]
            lines.append(as_yaml(value, indent + "  ").rstrip("\n"))
            continue
        if field.description:
            lines.append(f"{indent}# {field.description}")
        # Flow style keeps lists and mappings on the key's line.
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        lines.append(f"{indent}{key}: {text.splitlines()[0]}")
    return "\n".join(lines) + "\n"


def write_settings(settings: Settings, file: Path) -> None:
    """Write ``run.yaml`` atomically."""
    head = (
        "# All settings of this run. To change them, edit this file and start `umed upgrade --config` with it again.\n"
    )
    files.write_text(file, head + as_yaml(settings))
