"""Resume a run with all its trained weights, the same order of its data, and the flags with which it was begun.

Targets: `LLaVATrainer._save_checkpoint`, `_save`, `save_state`, `_load_from_checkpoint` and `_get_train_sampler`.
Why: (1) LLaVA saves trained weights outside the adapter, above all the projector, only at the very end (LLaVA #729, #1200,
#1245, PR #1813). A run resumed from an intermediate checkpoint continues with a trained adapter and an untrained projector. (2)
The order of an epoch is drawn from the global random state, which dropout changes on a CPU. So a resumed run sees other
batches. (3) LLaVA resumes from any ``checkpoint-*`` in the output folder, even one of the other stage, and overwrites the other
stage's files. (4) It resumes under any flags, even with other data or another learning rate, and says nothing.
(5) With ``--tune_mm_mlp_adapter`` its checkpoints hold the projector alone, from which no run can be resumed.
Versions: LLaVA 1.2.x, transformers 4.36, 4.37 and 5.23.
Delete when: LLaVA saves ``non_lora_trainables.bin`` with every checkpoint and loads it on resume.

Only with ``--umed_stage``. The files have LLaVA's names and formats.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.added_tokens import flags_that_add, tokenizer_files, why_lost
from umed_plugin.checkpoints.folder import NON_LORA, read_tensors
from umed_plugin.checkpoints.trained_on import MARKER
from umed_plugin.errors import UmedError, did_you_mean, warn
from umed_plugin.files import read_object, write_json
from umed_plugin.flags.checks import raise_faults
from umed_plugin.patches.training_run import LLAVA, TRANSFORMERS, TrainingRun
from umed_plugin.patching import Patch, Recorder, Target
from umed_plugin.training import run_settings
from umed_plugin.training.made_with import MADE_WITH, made_with

PROJECTOR = "mm_projector.bin"


def change(recorder: Recorder) -> None:
    """Wrap the methods of LLaVA's trainer. Our own trainer inherits them."""
    from llava.train.llava_trainer import LLaVATrainer

    stock_save_checkpoint = LLaVATrainer._save_checkpoint
    stock_save = LLaVATrainer._save
    stock_save_state = LLaVATrainer.save_state
    stock_load = LLaVATrainer._load_from_checkpoint
    stock_sampler = LLaVATrainer._get_train_sampler

    def _save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        if _is_lora(self) or _is_projector_alone(self):
            # Under ZeRO-3 all ranks must gather together, but `_save` runs on rank 0 only.
            non_lora_state = sys.modules["llava.train.train"].get_peft_state_non_lora_maybe_zero_3
            self.umed_non_lora = non_lora_state(self.model.named_parameters())
        try:
            if _is_projector_alone(self):
                # LLaVA's own would save the projector without the optimizer.
                super(LLaVATrainer, self)._save_checkpoint(model, trial, metrics)
            else:
                stock_save_checkpoint(self, model, trial, metrics)
        finally:
            self.umed_non_lora = None

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        stock_save(self, output_dir, state_dict)
        if _has_stage(self) and self.args.should_save:
            _save_beside(self, Path(output_dir if output_dir is not None else self.args.output_dir))

    def save_state(self: Any) -> None:
        stock_save_state(self)
        # At the end of a LoRA run LLaVA writes the folder without calling `_save`.
        if _has_stage(self) and self.args.should_save:
            _mark(self, Path(self.args.output_dir))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, loaded = Path(resume_from_checkpoint), self.model if model is None else model
        if _is_projector_alone(self):
            _load_non_lora(loaded, folder, PROJECTOR)
            return
        stock_load(self, resume_from_checkpoint, model)
        if _is_lora(self):
            _load_non_lora(loaded, folder, NON_LORA)

    def _get_train_sampler(self: Any, *data: Any) -> Any:
        if not _has_stage(self) or self.train_dataset is None:
            return stock_sampler(self, *data)
        from umed_plugin.training.sampler import EpochSampler, NumberedEpochs

        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        grouped = self.args.group_by_modality_length or self.args.group_by_length
        size = len(self.train_dataset)
        sampler = SeededOrder(stock_sampler(self, *data), seed) if grouped else EpochSampler(size, seed)
        return NumberedEpochs(sampler, size) if self.args.umed_augment else sampler

    recorder.replace(LLaVATrainer, "_save_checkpoint", _save_checkpoint)
    recorder.replace(LLaVATrainer, "_save", _save)
    recorder.replace(LLaVATrainer, "save_state", save_state)
    recorder.replace(LLaVATrainer, "_load_from_checkpoint", _load_from_checkpoint)
    recorder.replace(LLaVATrainer, "_get_train_sampler", _get_train_sampler)


def _has_stage(trainer: Any) -> bool:
    return getattr(trainer.args, "umed_stage", None) is not None


def _is_lora(trainer: Any) -> bool:
    return _has_stage(trainer) and trainer.args.lora_enable


def _is_projector_alone(trainer: Any) -> bool:
    """--tune_mm_mlp_adapter, as LLaVA has copied it to the training arguments."""
    return _has_stage(trainer) and not trainer.args.lora_enable and getattr(trainer.args, "tune_mm_mlp_adapter", False)


class SeededOrder:
    """A sampler that draws from the global random state, made to depend only on the seed and the number of epochs begun.

    LLaVA's grouping by length accepts a generator but does not pass it to all of its draws.

    Args:
        sampler: gives the order.
        seed: of its draws.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.epochs_begun = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        import torch

        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPUs, whose state is not restored here.
            torch.default_generator.manual_seed(self.seed + self.epochs_begun)
            self.epochs_begun += 1
            return iter(list(self.sampler))


def _mark(trainer: Any, folder: Path) -> None:
    """Record the stage, and what the run was started with, in a folder with its weights."""
    settings = getattr(trainer.args, "umed_settings", {})
    content = {"umed_stage": trainer.args.umed_stage, run_settings.SETTINGS: settings}
    write_json(folder / MARKER, {**content, MADE_WITH: made_with()})


def _save_beside(trainer: Any, folder: Path) -> None:
    """Write what a checkpoint needs besides: the stage, and the trained weights outside an adapter with the configuration."""
    import torch

    _mark(trainer, folder)
    if getattr(trainer, "umed_non_lora", None) is not None:
        torch.save(trainer.umed_non_lora, folder / (PROJECTOR if _is_projector_alone(trainer) else NON_LORA))
        trainer.model.config.save_pretrained(folder)


def _load_non_lora(model: Any, checkpoint: Path, name: str = NON_LORA) -> None:
    """Load the projector and all other weights that were trained besides an adapter, from the file ``name``.

    Raises:
        UmedError: the checkpoint lacks some of them.
    """
    file = checkpoint / name
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    if not file.is_file():
        if not trained:
            return
        raise UmedError(
            f"{checkpoint}: has no {name}, so the trained projector is lost (stock LLaVA saves it only at the end). "
            "Start again with another --output_dir, or remove the checkpoint-* folders."
        )
    weights = read_tensors(file)
    missing = sorted(trained - set(weights))
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if missing or unknown:
        raise UmedError(
            f"{file}: does not fit this run: missing {missing[:3]}, unknown {unknown[:3]}. Resume with the flags with "
            "which the run was started (--tune_mm_mlp_adapter, --freeze_mm_mlp_adapter, --model_name_or_path)."
        )


def find_faults(run: TrainingRun) -> list[str]:
    """Files of the other stage in the output folder, or a checkpoint that was trained under other settings."""
    if not run.active:
        return []
    return [*_not_mergeable(run), *(_other_stage(run) or _unknown_names(run) or _changed_settings(run))]


def _not_mergeable(run: TrainingRun) -> list[str]:
    """What `umed merge` could not take from a LoRA folder or a projector, said before hours of training."""
    faults = _lost_tokens(run)
    bias = getattr(run.training_args, "lora_bias", "none")
    if run.training_args.lora_enable and bias != "none":
        faults.append(
            f"--lora_bias {bias}: it trains biases that umed merge cannot merge. Allowed: none, which is LLaVA's default."
        )
    return faults


def _lost_tokens(run: TrainingRun) -> list[str]:
    """Flags that add tokens to a checkpoint of which LLaVA will save an adapter or the projector alone."""
    model_args, cache_dir = run.model_args, run.training_args.cache_dir
    base = model_args.model_name_or_path
    if not run.training_args.lora_enable and not model_args.tune_mm_mlp_adapter:
        return []
    lost = flags_that_add(vars(model_args), base, cache_dir)
    if not lost or not tokenizer_files(base, cache_dir):  # without a tokenizer, loading it says what is missing
        return []
    default = {"mm_use_im_patch_token": " (LLaVA's default if you did not give it)"}
    return [f"--{flag} True{default.get(flag, '')} adds {why_lost(flag, base)}" for flag in lost]


def _other_stage(run: TrainingRun) -> list[str]:
    """LLaVA would resume from files of the other stage, or overwrite them."""
    output = Path(run.training_args.output_dir)
    for marker in (*sorted(output.glob(f"checkpoint-*/{MARKER}")), output / MARKER):
        stage = read_object(marker).get("umed_stage") if marker.is_file() else run.flags.umed_stage
        if stage is None:
            return [
                f"{marker}: has no umed_stage, so it is damaged. Use another --output_dir, or remove {marker.parent}."
            ]
        if stage != run.flags.umed_stage:
            content = "its content" if marker.parent == output else marker.parent.name
            return [
                f"--output_dir {output}: {content} belongs to --umed_stage {stage}, and LLaVA would resume from it or overwrite "
                f"it. Use another --output_dir for {run.flags.umed_stage}."
            ]
    return []


def _unknown_names(run: TrainingRun) -> list[str]:
    """Names in ``--umed_accept_changed`` that no flag has."""
    parts = (run.model_args, run.data_args, run.training_args)
    known = {flag.name for part in parts for flag in dataclasses.fields(part)} | {*run_settings.OTHER_NAMES}
    unknown = sorted(run.flags.accepted_changes() - known)
    return [f"--umed_accept_changed {name}: there is no such flag.{did_you_mean(name, known)}" for name in unknown]


def _changed_settings(run: TrainingRun) -> list[str]:
    """What has changed since the checkpoint from which LLaVA would resume was written, as far as it cannot go on."""
    args = run.training_args
    args.umed_settings = run_settings.settings_of(run.model_args, run.data_args, args)
    checkpoint = run_settings.last_checkpoint(Path(args.output_dir))
    if checkpoint is None:
        return []
    if not (checkpoint / "trainer_state.json").is_file():
        return [
            f"--output_dir {args.output_dir}: {checkpoint.name} has no trainer_state.json, so no run can be resumed from it "
            "(stock LLaVA writes such with --tune_mm_mlp_adapter). Remove it, or choose another --output_dir."
        ]
    if args.deepspeed and not any(checkpoint.glob("global_step*")):
        return [
            f"--deepspeed {args.deepspeed}: {checkpoint} has no global_step* folder, so DeepSpeed cannot resume from it. It was "
            "saved with --save_only_model, or trained without DeepSpeed. Remove it, or choose another --output_dir."
        ]
    if not args.deepspeed and not (checkpoint / "optimizer.pt").is_file() and args.process_index == 0:
        warn(
            f"{checkpoint} holds no optimizer (--save_only_model). Adam's averages start at 0 and the learning rate at its "
            "schedule's beginning, so this run departs from the stopped one."
        )
    before = run_settings.stored_settings(checkpoint)
    if before is None:
        run.say(f"{checkpoint} does not say with which flags it was trained, so they are not compared.")
        return []
    return _compared(run, checkpoint, before, args.umed_settings)


def check_records(run: TrainingRun, records: list[dict[str, Any]]) -> None:
    """Refuse to resume on other records of ``--umed_recipe``, which are known only when they are built.

    Raises:
        UsageError: they have changed, and ``--umed_accept_changed`` does not name them.
    """
    args = run.training_args
    if not run.active or run.flags.umed_recipe is None:
        return
    now = {run_settings.RECORDS: run_settings.records_digest(records)}
    args.umed_settings.update(now)
    checkpoint = run_settings.last_checkpoint(Path(args.output_dir))
    before = None if checkpoint is None else run_settings.stored_settings(checkpoint)
    if checkpoint is not None and before is not None:
        raise_faults(_compared(run, checkpoint, before, now))


def _compared(run: TrainingRun, checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare settings, say what goes on under changed ones, and return what does not."""
    between, accepted = any(checkpoint.glob("rollout_*.pt")), run.flags.accepted_changes()
    changes = run_settings.find_changes(before, now, between_updates=between)
    faults = run_settings.refusals(changes, checkpoint.name, accepted, between_updates=between)
    if changes and not faults:
        run.say(f"{checkpoint.name} was trained under other settings: {'; '.join(map(str, changes))}. Going on.")
    return faults


PATCH = Patch(
    name="lora_resume",
    targets=(
        Target(
            "llava.train.llava_trainer:LLaVATrainer._save_checkpoint",
            LLAVA,
            ("c7c4f221acd1b64cda695e18f02eede5abbcdd82a581eb7a901d30b2590a511c",),
        ),
        Target(
            "llava.train.llava_trainer:LLaVATrainer._save",
            LLAVA,
            ("4a2fff975c8527b0d0e2afacd3fc96fb2d93273b79b647924d8194d398e78625",),
        ),
        Target(
            "llava.train.llava_trainer:LLaVATrainer._get_train_sampler",
            LLAVA,
            ("283f52d877d9ba39a9aa9996c2a6c850d14aefb3ecdaf1d00dcc1eff1e6e64db",),
        ),
        Target(
            "transformers.trainer:Trainer._load_from_checkpoint",
            TRANSFORMERS,
            (
                "201a2dc3b77a71b3eb462ecff3354b0cd2ba9c49405de37523c9d7d97a2e5b6c",  # 4.36
                "ab79e932a65041763ac1863aaa94f43e719f35f69c0229b1f5216228fdf36c86",  # 4.37
                "a2804e8d93a297e30d11e1589e707793302c872fc3ab89cddefc6cb2762e3a24",  # 5.23
            ),
        ),
        Target(
            "transformers.trainer:Trainer._save_checkpoint",
            TRANSFORMERS,
            (
                "2b94f43c7b36c0427a50e423d125ded3b950d47251b955e26c296b0edd45090a",  # 4.36
                "de8f0b92e79c8f8b40fd763d116c84e7eec1ba1741e001ab56c5f82a23c8607a",  # 4.37
                "a9111e30faa9933986e022e56b5af81fd990356db64d727b4c320c852283bf3b",  # 5.23
            ),
        ),
        Target(
            "transformers.trainer:Trainer.save_state",
            TRANSFORMERS,
            (
                "ea6f492cd722900bca129b8eaed731bb1972d98591b795a8166058b1e1611af0",  # 4.36
                "df50efbfb935e1ea576f79ecc2021aa73768fc41b99c98162b7f6d840ee2437d",  # 5.23
            ),
        ),
    ),
    why="a resumed LoRA run loses its trained projector, and sees other batches than an uninterrupted run",
    delete_when="LLaVA saves non_lora_trainables.bin with every checkpoint and loads it on resume",
    change=change,
)
