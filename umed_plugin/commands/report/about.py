"""What was run: checkpoint, recipe, settings, versions, commit, date, duration and machine, from the files that a run leaves.

A run of an earlier version, or one of another program, lacks some of these. What is not known is left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from umed_plugin.commands.report.forms import DecisionForm, ManifestForm, RunSummaryForm
from umed_plugin.commands.report.run_folder import Run, Training, stage_label
from umed_plugin.data.similar import WITHOUT_SIMILAR
from umed_plugin.data.texts import read_yaml
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.forms import Form, check_object
from umed_plugin.files import read_object
from umed_plugin.terminal.progress import duration

Facts = list[tuple[str, str]]

# Shown first, in this order; the page folds the others.
_FIRST = {
    "model_name_or_path": "from checkpoint",
    "umed_recipe": "recipe",
    "data_path": "records",
    "version": "template",
    "learning_rate": "learning rate",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch size per process",
    "gradient_accumulation_steps": "accumulation",
    "world_size": "processes",
    "lora_enable": "LoRA",
    "lora_r": "LoRA rank",
    "seed": "seed",
}
_OF_REWARDING = {
    "umed_algorithm": "algorithm",
    "umed_num_candidates": "candidates per question",
    "umed_rewards": "rewards",
    "umed_reward_weights": "weights of the rewards",
    "umed_reward_norm": "normalisation",
    "umed_judge": "judge",
    "umed_temperature": "temperature",
    "umed_kl_coef": "KL coefficient",
}


def about_run(run: Run) -> Facts:
    """(name, value) of the run as a whole."""
    settings, summary, manifest = _upgrade_settings(run), _run_summary(run), _manifest(run)
    facts: Facts = [("folder", str(run.folder))]
    facts += _known(settings, {"checkpoint": "started from", "recipe": "recipe", "data_root": "data"})
    first = next((training.settings for training in run.trainings if training.stage and training.settings), {})
    if not settings and first:
        facts += _known(first, {"model_name_or_path": "started from", "umed_recipe": "recipe"})
        facts += _known(first, {} if first.get("umed_recipe") else {"data_path": "records"})
    sources = {row.groups.get("source") for one in run.evaluations.values() for row in one.predictions}
    facts += [("sources of the studies", ", ".join(sorted(filter(None, sources))))] if any(sources) else []
    seeds = [source["seed"] for source in (summary, settings) if source.get("seed") is not None]
    facts += [("seed", str(seeds[0]))] if seeds else []
    evaluated = [name for name, evaluation in run.evaluations.items() if evaluation.checkpoint]
    facts += [(f"evaluated as {stage_label(name)}", _evaluated(name, run)) for name in evaluated]
    decided = decision_words(run)
    facts += [("rewarding: auto", decided)] if decided else []
    facts += [fact for training in run.trainings for fact in _times(training)]
    seconds = summary.get("seconds") or sum(training.seconds or 0 for training in run.trainings)
    facts += (
        [("duration" if "seconds" in summary else "duration of the trainings' last starts", duration(seconds))]
        if seconds
        else []
    )
    return [*facts, *_made_with(next((one.made_with for one in reversed(run.trainings) if one.made_with), manifest))]


def decision_words(run: Run) -> str:
    """What ``rewarding: auto`` has decided by its trial, and why; empty where it has not."""
    kept = run.folder / "trial" / "decision.json"  # of a run that has not come to its end
    decided = _run_summary(run).get("rewarding_auto")
    if decided is None and kept.is_file() and any(training.trial for training in run.trainings):
        decided = _checked(kept, DecisionForm)
    return "" if decided is None else f"stage 2 was {decided['stage_2']}: {' '.join(decided['because'])}"


def _evaluated(stage: str, run: Run) -> str:
    """The checkpoint that was evaluated, and the training that it was exported from."""
    checkpoint = run.evaluations[stage].checkpoint
    trained = next((one.name for one in run.trainings if one.stage == stage and not one.trial), None)
    if trained is None or trained in Path(checkpoint).parts:
        return checkpoint
    return f"{checkpoint} (exported from {trained}, which {stage_label(stage)} trained)"


def _times(training: Training) -> Facts:
    """When a stage last started, and ended: its weights were written then, and the trainer measured how long that start took."""
    try:
        ended = datetime.fromisoformat(str(training.made_with.get("at")))
    except ValueError:
        return []
    label, form = training.label, "%Y-%m-%d %H:%M %Z"
    started = [ended - timedelta(seconds=training.seconds)] if training.seconds else []
    times = [f"{when:{form}}".strip() for when in (*started, ended)]
    return [(f"{label} last started, ended" if started else f"{label}: last weights written", ", ".join(times))]


def about_training(training: Training) -> Facts:
    """(name, value) of what decides a training most."""
    rewarding = _OF_REWARDING if training.stage == "rewarding" else {}
    names = {**_FIRST, **rewarding}
    most = training.settings.get("max_steps")
    if isinstance(most, int) and most > 0:  # it overrides the epochs
        del names["num_train_epochs"]
    facts = _known(_in_effect(training), names)
    if training.settings.get("umed_similar"):
        facts.append(("similar cases", f"{training.settings['umed_similar']} before each question. {WITHOUT_SIMILAR}"))
    return [*facts, *([("duration of its last start", duration(training.seconds))] if training.seconds else [])]


def other_settings(training: Training) -> Facts:
    """(flag, value) of all other flags, in alphabetical order."""
    shown = {*_FIRST, *(_OF_REWARDING if training.stage == "rewarding" else ())}
    return [(name, _words(value)) for name, value in sorted(_in_effect(training).items()) if name not in shown]


def _in_effect(training: Training) -> dict[str, Any]:
    """The settings without those of the other stage, of an adapter or a quantisation that is off, and names without content."""
    from umed_plugin.flags.definition import UmedFlags
    from umed_plugin.flags.needs import rules_of

    settings = training.settings
    idle = {flag.name for flag in dataclasses.fields(UmedFlags) if training.stage not in (None, *rules_of(flag).stages)}
    if not settings.get("lora_enable"):
        idle |= {name for name in settings if name.startswith("lora_") and name != "lora_enable"}
    if settings.get("bits") == 16:
        idle |= {"double_quant", "quant_type"}
    return {name: value for name, value in settings.items() if name not in idle and not _is_a_class_name(value)}


def _is_a_class_name(value: Any) -> bool:
    """Whether it is an object that was kept as the name of its class alone, such as ``'AcceleratorConfig'``."""
    return isinstance(value, str) and re.fullmatch(r"'[A-Za-z_]+'", value) is not None


def _known(settings: Mapping[str, Any], names: Mapping[str, str]) -> Facts:
    """The settings that are set, under readers' names."""
    unset = (None, "", -1)
    return [(label, _words(settings[key])) for key, label in names.items() if settings.get(key) not in unset]


def _words(value: Any) -> str:
    if isinstance(value, Mapping) and "path" in value:
        return f"{value['path']} (sha256 {str(value.get('sha256'))[:12]})"
    return value if isinstance(value, str) else json.dumps(value)


def _made_with(made: Mapping[str, Any]) -> Facts:
    facts = [(name, str(made[name])) for name in ("commit", "machine", "device") if made.get(name)]
    versions = made.get("versions") or {}
    return facts + (
        [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))] if versions else []
    )


def _upgrade_settings(run: Run) -> dict[str, Any]:
    file = run.folder / "run.yaml"
    try:
        found = read_yaml(file) if file.is_file() else {}
    except UmedError:
        return {}
    return found if isinstance(found, dict) else {}


def _manifest(run: Run) -> dict[str, Any]:
    """The manifest of an upgrade's result, which has the versions."""
    file = next(run.folder.glob("checkpoint/*/umed_manifest.json"), None)
    return _checked(file, ManifestForm) if file else {}


def _run_summary(run: Run) -> dict[str, Any]:
    file = run.folder / "summary.json"
    return _checked(file, RunSummaryForm) if file.is_file() else {}


def _checked(file: Path, form: type[Form]) -> dict[str, Any]:
    content = read_object(file)
    check_object(file, content, form, "remove it")
    return content
