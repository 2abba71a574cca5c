"""What a run was started with, kept in each of its checkpoints and compared when it is resumed.

LLaVA resumes from any ``checkpoint-*`` in ``--output_dir``, whatever the flags say now. `settings_of` collects all flags that
decide batches, order, objective or weights, and `find_changes` compares them with those of the last checkpoint. What happens
then is the flag's kind:

- `FREE`: not stored, such as logging. Any value will do.
- `SAID`: goes on and is named, such as ``--max_steps`` or a folder that has moved.
- `ACCEPTED`, all others: refused, unless ``--umed_accept_changed`` names the flag.
- `RESTORED`: refused, because the checkpoint's optimizer has the old value and would go on with it.
- `FIXED`: refused, because the checkpoint's weights or optimizer fit no other value.

The plugin's own flags say their kind where they are defined (`umed_plugin.flags.groups`); `_KINDS` has LLaVA's and those of
transformers. Files, and folders of checkpoints, count by their content: a copy under another name is the same.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.checkpoints.trained_on import CONTENT, MARKER, WEIGHTS, content_digest, weights_digest
from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import SYMBOLIC
from umed_plugin.flags.needs import rules_of
from umed_plugin.flags.rules import ACCEPTED, FIXED, FREE, RESTORED, REWARDING, SAID
from umed_plugin.flags.sharding import NONE, read_deepspeed

SETTINGS = "settings"
WORLD_SIZE = "world_size"
RECORDS = "records"  # of a recipe, as they were built
SYMBOLS = "symbols"  # files of the reward symbolic
JUDGE_ADDRESS = "umed_judge_base_url"
ZERO_STAGE, LAYOUT = "zero_stage", "deepspeed_layout"
OPTIMIZER, SCHEDULER = "deepspeed_optimizer", "deepspeed_scheduler"
OTHER_NAMES = (WORLD_SIZE, RECORDS, SYMBOLS, ZERO_STAGE, OPTIMIZER, SCHEDULER, LAYOUT)  # what is compared besides flags

# What shapes a rollout besides the flags of stage 2 alone: its records, their order, how they are shown, and the precision.
_OF_A_ROLLOUT = (
    *("seed", "data_seed", "data_path", RECORDS, SYMBOLS),
    *("version", "image_aspect_ratio", "model_max_length", "bf16", "fp16"),
    *("umed_box_decimals", "umed_stock_template_share", "umed_on_bad_image", "umed_augment", "umed_label_share"),
    *("umed_similar", "umed_max_new_tokens"),
)
_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", WORLD_SIZE)
_KINDS = {
    **dict.fromkeys(("learning_rate", "mm_projector_lr", "weight_decay"), RESTORED),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), RESTORED),
    **dict.fromkeys(
        ("model_name_or_path", "vision_tower", "mm_vision_select_layer", "mm_vision_select_feature"), FIXED
    ),
    **dict.fromkeys(("mm_projector_type", "mm_use_im_start_end", "mm_use_im_patch_token", "bits", "optim"), FIXED),
    **dict.fromkeys(
        ("freeze_backbone", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "adafactor", "optim_args"), FIXED
    ),
    **dict.fromkeys(("lora_enable", "lora_r", "lora_alpha", "lora_bias"), FIXED),
    **dict.fromkeys((ZERO_STAGE, OPTIMIZER, SCHEDULER, LAYOUT), FIXED),  # by which DeepSpeed lays out its files
    **dict.fromkeys(("max_steps", "num_train_epochs", "image_folder", "deepspeed"), SAID),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs", "tf32"), SAID),
    **dict.fromkeys(("attn_implementation", "mpt_attn_impl", "lazy_preprocess", "is_multimodal", "cache_dir"), FREE),
    **dict.fromkeys(("debug", "disable_tqdm", "do_train", "do_predict", "local_rank", "_n_gpu", "output_dir"), FREE),
    **dict.fromkeys(("overwrite_output_dir", "report_to", "resume_from_checkpoint", "run_name", "label_names"), FREE),
    **dict.fromkeys(("no_cuda", "use_cpu", "use_mps_device", "use_ipex", "use_cache", "enable_jit_checkpoint"), FREE),
    **dict.fromkeys(("greater_is_better", "metric_for_best_model", "load_best_model_at_end", "jit_mode_eval"), FREE),
    **dict.fromkeys(("past_index", "prediction_loss_only", "project", "lora_weight_path"), FREE),
    **dict.fromkeys(
        ("ray_scope", "mp_parameters", "skip_memory_metrics", "batch_eval_metrics", "auto_find_batch_size"), FREE
    ),
    **dict.fromkeys(("length_column_name", "restore_callback_states_from_checkpoint", "torchdynamo"), FREE),
    **dict.fromkeys(("per_device_eval_batch_size", "per_gpu_eval_batch_size", "use_legacy_prediction_loop"), FREE),
    **dict.fromkeys(("fp16_backend", "half_precision_backend", "fp16_full_eval", "bf16_full_eval"), FREE),
}
_FREE_BEGINNINGS = (
    *("logging_", "log_", "save_", "hub_", "push_to_hub", "eval", "do_eval", "ddp_", "tpu_", "torch_", "include_"),
    *(
        "trackio_",
        "dataloader_num",
        "dataloader_pin",
        "dataloader_persistent",
        "dataloader_prefetch",
        "dataloader_multi",
    ),
)


@dataclass(frozen=True)
class Change:
    """A flag that was something else when the checkpoint was written.

    Attributes:
        name: of the flag, or ``world_size``.
        was, now: its values, as text.
        kind: what a resumed run does about it.
    """

    name: str
    was: str
    now: str
    kind: str

    @property
    def flag(self) -> str:
        """How the user knows it."""
        names = {
            WORLD_SIZE: "the number of processes",
            RECORDS: "the records of --umed_recipe",
            SYMBOLS: "the file of --umed_rewards symbolic",
            ZERO_STAGE: "zero_optimization.stage in the file of --deepspeed",
            OPTIMIZER: "optimizer in the file of --deepspeed",
            SCHEDULER: "scheduler in the file of --deepspeed",
            LAYOUT: "the layout of the optimizer in the file of --deepspeed",
        }
        return names.get(self.name, f"--{self.name}")

    def __str__(self) -> str:
        return f"{self.flag}: {self.was} -> {self.now}"


def kind_of(name: str) -> str:
    """What a resumed run does about another value of a flag."""
    own = {flag.name: rules_of(flag).on_resume for flag in dataclasses.fields(UmedFlags)}
    if name in own:
        return own[name]
    return _KINDS.get(name, FREE if name.startswith(_FREE_BEGINNINGS) else ACCEPTED)


def settings_of(*arguments: Any) -> dict[str, Any]:
    """All that a resumed run must agree on: the fields of LLaVA's three dataclasses that are not `FREE`, as JSON.

    A path to a file, or to a folder with a ``config.json``, becomes ``{"path": ..., "sha256": ...}``; a folder
    with weights also has ``weights_sha256``, of these alone.
    """
    fields = ((flag.name, getattr(part, flag.name)) for part in arguments for flag in dataclasses.fields(part))
    found = {name: _as_json(value) for name, value in fields if kind_of(name) != FREE}
    found[WORLD_SIZE] = int(os.environ.get("WORLD_SIZE", "1"))
    return found | _symbols(found) | _of_deepspeed(arguments)


def _of_deepspeed(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What the file of ``--deepspeed`` says of the files in a checkpoint; nothing without one."""
    given = (getattr(part, "deepspeed", None) for part in arguments)
    file = next((read for read in map(read_deepspeed, given) if read is not None), None)
    if file is None:
        return {}
    return {
        ZERO_STAGE: file.zero_stage, OPTIMIZER: file.optimizer, SCHEDULER: file.scheduler, LAYOUT: file.layout,
    }  # fmt: skip


def _symbols(found: dict[str, Any]) -> dict[str, Any]:
    """What the files of the reward ``symbolic:FILE`` hold; in ``umed_rewards`` their paths are left out then."""
    names = [name.strip() for name in str(found.get("umed_rewards", "")).split(",")]
    paths = [Path(name.partition(":")[2]) for name in names if name.startswith(f"{SYMBOLIC}:")]
    if not paths:
        return {}
    plain = [SYMBOLIC if name.startswith(f"{SYMBOLIC}:") else name for name in names]
    digest = hashlib.sha256(b"".join((content_digest(path) or "").encode() for path in paths)).hexdigest()
    return {"umed_rewards": ",".join(plain), SYMBOLS: {"path": ", ".join(map(str, paths)), "sha256": digest}}


def records_digest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What tells the records of a recipe from others: their number and content, wherever their images are.

    Their provenance, such as the digest of the recipe's file, changes with a comment there, and does not count.
    """
    digest = hashlib.sha256()
    for record in records:
        counted = {**record, "image": os.path.basename(str(record.get("image"))), "provenance": None}
        digest.update(json.dumps(counted, sort_keys=True, default=str).encode())
    return {"path": f"{len(records)} records", "sha256": digest.hexdigest()}


def _as_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str) and value and os.path.exists(value):
        digest, weights = content_digest(Path(value)), None
        if digest is not None and os.path.isdir(value):
            weights = weights_digest(Path(value))  # by which an adapter's base is known again
        found = {CONTENT: digest, **({} if weights is None else {WEIGHTS: weights})}
        return value if digest is None else {"path": value, **found}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(type(value).__name__)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The ``checkpoint-N`` that LLaVA would resume from."""
    found = (
        re.fullmatch(r"checkpoint-(\d+)", entry.name) for entry in output_dir.glob("checkpoint-*") if entry.is_dir()
    )
    numbers = [int(match[1]) for match in found if match]
    return output_dir / f"checkpoint-{max(numbers)}" if numbers else None


def stored_settings(checkpoint: Path) -> dict[str, Any] | None:
    """The settings in a checkpoint; None if it was written before they were stored.

    Raises:
        UmedError: the file that holds them is damaged.
    """
    marker = checkpoint / MARKER
    content = files.read_object(marker) if marker.is_file() else {}
    settings: dict[str, Any] | None = content.get(SETTINGS)
    if settings is not None and not isinstance(settings, dict):
        raise UmedError(
            f"{marker}: its settings are a {type(settings).__name__}; expected an object. Remove {checkpoint}."
        )
    return settings


def find_changes(before: dict[str, Any], now: dict[str, Any], *, between_updates: bool = False) -> list[Change]:
    """The flags whose values differ; one that only one side knows, such as a newer library's, is not compared.

    Args:
        before: settings in the checkpoint.
        now: settings of this run.
        between_updates: whether the checkpoint lies between the updates of a rollout. What shapes a rollout is `FIXED` then.
    """
    same_step = _queries_of_a_step(before) == _queries_of_a_step(now)
    changes = []
    for name in sorted({*before} & {*now}):
        if _same(before[name], now[name]) or kind_of(name) == FREE:
            continue
        kind = kind_of(name)
        if name == "umed_val_records" and not now.get("umed_stop_after"):
            continue  # only early stopping compares scores of before and after the change
        if name == "deepspeed" and None in (before[name], now[name]):
            kind = FIXED
        elif name == WORLD_SIZE and now.get("deepspeed") is not None:
            kind = FIXED  # each process has a part of the optimizer's state
        elif name == ZERO_STAGE and [before[name], now[name]] in ([1, 2], [2, 1]) and _has_usual_layout(before, now):
            kind = SAID  # DeepSpeed has one optimizer for both, which divides its state alike
        elif name in _STEP and same_step:
            kind = SAID
        if between_updates and (name in _STEP or _shapes_a_rollout(name)):
            kind = FIXED
        changes.append(Change(name, _words(before[name]), _words(now[name]), kind))
    return changes


def _has_usual_layout(*settings: dict[str, Any]) -> bool:
    """Whether nothing orders the optimizer's state otherwise.

    Old checkpoints do not say, and DeepSpeed 0.12 ignores it in ZeRO-1.
    """
    return all(one.get(LAYOUT) == NONE for one in settings)


def refusals(changes: list[Change], checkpoint: str, accepted: set[str], *, between_updates: bool = False) -> list[str]:
    """Why a run cannot be resumed under these changes, one sentence or two for each that is neither said nor accepted.

    Args:
        changes: from `find_changes`.
        checkpoint: its name.
        accepted: names in ``--umed_accept_changed``.
        between_updates: as for `find_changes`.
    """
    can_be = sorted({change.name for change in changes if change.kind == ACCEPTED} | accepted)
    faults = []
    for change in changes:
        begun = f"{change.flag} {change.now}: {checkpoint} was trained with {change.was}"
        undo = "Go back to that, or choose another --output_dir."
        if change.kind == RESTORED:
            faults.append(f"{begun}, and its optimizer would go on with that. {undo}")
        elif change.kind == FIXED and between_updates and kind_of(change.name) == ACCEPTED:
            faults.append(f"{begun}, and is in the middle of a rollout that was made with it. {undo}")
        elif change.kind == FIXED:
            faults.append(f"{begun}, which its weights or its optimizer need. {undo}")
        elif change.kind == ACCEPTED and change.name not in accepted:
            accept = f"accept the change: --umed_accept_changed {','.join(can_be)}"
            faults.append(f"{begun}. Go back to that, choose another --output_dir, or {accept}.")
    return faults


def _shapes_a_rollout(name: str) -> bool:
    """Whether a rollout, its minibatches or what they learn depend on a setting that may be accepted elsewhere."""
    own = {flag.name: rules_of(flag) for flag in dataclasses.fields(UmedFlags)}
    rewarding = name in own and own[name].stage == REWARDING and own[name].on_resume == ACCEPTED
    if name == JUDGE_ADDRESS:
        return False  # a rollout keeps its scores, and a server may have moved
    return rewarding or name in _OF_A_ROLLOUT or name.startswith("umed_vrr_")


def _queries_of_a_step(settings: dict[str, Any]) -> int:
    """Records of an optimizer step over all processes."""
    first, second, third = (int(settings.get(name) or 1) for name in _STEP)
    return first * second * third


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, dict) and isinstance(now, dict) and "sha256" in before and "sha256" in now:
        return bool(before["sha256"] == now["sha256"])
    paths = [value["path"] if isinstance(value, dict) and "sha256" in value else value for value in (before, now)]
    return bool(paths[0] == paths[1])


def _words(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['path']} ({value['sha256'][:8]})"
    return str(value)
