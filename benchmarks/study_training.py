"""The trainings and evaluations of a study: one process each, measured in processor seconds, made once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_data import labelled_file, make_data
from study_plan import BASE, Cell, Data, Flags, Study, budget_of, data_of, flags_of
from study_recipes import GENERATED, counted_contents
from study_rows import Rows

from umed_plugin import files
from umed_plugin.commands.demo.pipeline import DemoRun, DemoSettings, environment
from umed_plugin.data.records import load_records, save_records
from umed_plugin.errors import UmedError
from umed_plugin.files.locks import locked
from umed_plugin.terminal.progress import Steps

CHECKPOINT = "llava-mistral"  # stock LLaVA chooses the class by the folder's name
ANSWER_TOKENS = 104
# Two lengths whose difference is that of the steps alone.
SHORT, LONG = 5, 45
# Flags on which the time of a step does not depend.
UNTIMED = ("learning_rate", "lr_scheduler_type", "warmup_ratio")
COMMON: Flags = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "model_max_length": 512,
    "weight_decay": 0.0,
    "use_cpu": True,
    "dataloader_num_workers": 0,
    "lazy_preprocess": True,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "version": "umed_mistral",
}

CURVES = ("val/", "reward/", "localization_curriculum", "guard/iou_over", "guard/accuracy_over", "attention_on_lesion")


def measured(command: Sequence[Any], log: Path, cwd: Path) -> float:
    """Run a command; returns the processor seconds, user and system, of it and of all processes that it waited for.

    A busy machine lengthens the wall time of a training, and its processor time too, by up to a fifth.

    Raises:
        UmedError: it failed; the message has the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    with open(log, "ab") as stream:
        stream.write((" ".join(words) + "\n").encode())
        stream.flush()
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, env=environment())
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise UmedError(f"{words[0]} ended with {process.returncode}. From {log}:\n{end}")
    return usage.ru_utime + usage.ru_stime


def _curves(log: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a training says of itself and is worth keeping, as ``step:value step:value``: held-out values, rewards, guards."""
    kept: dict[str, list[str]] = defaultdict(list)
    for entry in log:
        for name, value in entry.items():
            if name.startswith(CURVES):
                kept[name].append(f"{entry['step']}:{value:.4g}")
    return {name: " ".join(values) for name, values in kept.items()}


class Workshop:
    """What a study makes under its folder: data and base of each seed, checkpoints, and rows.

    Args:
        folder: ``OUT``; data, checkpoints and logs are below ``work/``.
        study: as read.
        rows: where finished results are.
    """

    def __init__(self, folder: Path, study: Study, rows: Rows) -> None:
        self.work, self.study, self.rows = folder / "work", study, rows
        self._locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._measuring = threading.RLock()

    def finish(self, cell: Cell) -> None:
        """Make the row of a cell, unless it is there."""
        if self.rows.has(cell):
            return
        about = self._checkpoint(cell)
        self.rows.add(cell, about, self._evaluate(cell))

    def base(self, seed: int) -> Path:
        """The seed's base checkpoint: the demo's, trained on captions of all training studies and on no box."""
        demo = self._demo(seed)
        done = demo.out / "base.json"
        with self._alone(done):
            if not done.is_file():
                demo.out.mkdir(parents=True, exist_ok=True)
                records = load_records(make_data(demo.data, self._generated(), seed))
                save_records([record for record in records if record["split"] == "train"], demo.tuning_records)
                shutil.rmtree(demo.runs, ignore_errors=True)
                demo.base_checkpoint()
                files.write_json(done, {"seed": seed})
        return demo.base

    def _generated(self) -> Data:
        """The demo's studies that the base is trained on, whatever the study's own data are."""
        own = self.study.data
        return Data(train=own.train, val=own.val, test=own.test)

    def _demo(self, seed: int) -> DemoRun:
        from rich.console import Console

        epochs = self.study.base_captions_epochs
        settings = DemoSettings(prior_epochs=epochs, processes=1, max_new_tokens=ANSWER_TOKENS)
        return DemoRun(self._of_seed(seed), seed, settings, Steps(Console(quiet=True)))

    def _of_seed(self, seed: int) -> Path:
        """The folder of a seed, which has one for each content of the demo's recipe."""
        content = counted_contents(GENERATED).get(GENERATED)
        return self.work / f"seed{seed}{f'-{content}' if content else ''}"

    def records(self, seed: int, variant: str) -> Path:
        """``records.json`` of a variant's data."""
        data, demo = data_of(self.study, variant), self._demo(seed)
        if Data(**{**data.model_dump(), "box_noise": 0.0}) == self._generated():
            folder = demo.data  # `base` has written it
        else:
            settings = {**data.model_dump(), "box_noise": 0, **counted_contents(data.recipe)}
            content = json.dumps(settings, sort_keys=True)
            folder = demo.out / f"data-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        with self._alone(folder / "records.json"):
            return make_data(folder, data, seed)

    def checkpoint(self, cell: Cell) -> Path:
        """Where the checkpoint of a cell is, or will be."""
        return self._of_seed(cell.seed) / "checkpoints" / cell.name / CHECKPOINT

    def _checkpoint(self, cell: Cell) -> dict[str, Any]:
        """Train the cell's checkpoint and what it goes on from, unless they are there; returns what its row says of it."""
        target = self.checkpoint(cell).parent
        with self._alone(target):
            if not (target / "trained.json").is_file():
                start = self.study.arms[cell.arm].start
                before = {} if start == BASE else self._checkpoint(Cell(cell.seed, cell.size, cell.variant, start))
                self.base(cell.seed)
                with files.replacing_folder(target, overwrite=True) as partial:
                    about = {"training": uuid.uuid4().hex[:8], "started_from": before.get("training", BASE)}
                    about |= self._train(cell, partial)
                    files.write_json(partial / "trained.json", about)
            about = files.read_object(target / "trained.json")
        if about["settings"] != self.rows.digest(cell):
            raise UmedError(f"{target}: was trained under other settings. Remove it, and give the command again.")
        return about

    def _train(self, cell: Cell, folder: Path) -> dict[str, Any]:
        arm = self.study.arms[cell.arm]
        flags = flags_of(self.study, cell.variant, cell.arm)
        records = self._labelled(cell)
        sampling = 0.0
        if arm.sample is not None:
            records, sampling = self._best_answers(cell, records, folder)
        steps = arm.steps if isinstance(arm.steps, int) else self._equal_steps(cell, flags, sampling)
        seconds = self._run(cell.seed, self._start(cell), arm.stage, records, folder / CHECKPOINT, flags, steps)
        state = json.loads((folder / CHECKPOINT / "trainer_state.json").read_text(encoding="utf-8"))
        kept = [line["val/kept_step"] for line in state["log_history"] if "val/kept_step" in line]
        shutil.rmtree(folder / CHECKPOINT / "best_weights", ignore_errors=True)
        return {
            "settings": self.rows.digest(cell),
            "steps": state["global_step"],
            **({"kept_step": kept[-1]} if kept else {}),
            "processor_seconds": round(seconds + sampling, 1),
            **(self._plain_pace(cell) if cell.arm == self.study.budget else {}),
            **({"of_sampling": round(sampling, 1)} if sampling else {}),
            "curves": _curves(state["log_history"]),
        }

    def _start(self, cell: Cell) -> Path:
        start = self.study.arms[cell.arm].start
        if start == BASE:
            return self._demo(cell.seed).base
        return self.checkpoint(Cell(cell.seed, cell.size, cell.variant, start))

    def _labelled(self, cell: Cell) -> Path:
        records = self.records(cell.seed, cell.variant)
        with self._alone(records):
            return labelled_file(records, cell.size, data_of(self.study, cell.variant).box_noise, cell.seed)

    def _run(self, seed: int, start: Path, stage: int, records: Path, output: Path, flags: Flags, steps: int) -> float:
        """One training in one process; returns its processor seconds."""
        name = ("instruction_tuning", "rewarding")[stage - 1]
        given: dict[str, Any] = {"model_name_or_path": start, "vision_tower": self._demo(seed).tiny / "vision_tower"}
        given |= {"data_path": records, "image_folder": self.records_folder(records), "output_dir": output}
        given["umed_image_cache"] = self._demo(seed).out / "images"
        given |= {**COMMON, "umed_stage": name, "seed": seed, "max_steps": steps, **flags}
        words = [word for flag, value in given.items() for word in (f"--{flag}", value)]
        command = [sys.executable, "-m", "umed_plugin.launch", sys.executable, "-m", "llava.train.train_mem", *words]
        output.parent.mkdir(parents=True, exist_ok=True)
        return measured(command, output.parent / "training.log", output.parent)

    def records_folder(self, records: Path) -> Path:
        """The folder that a file's image paths are relative to: that of ``records.json``."""
        return next(folder for folder in records.parents if (folder / "records.json").is_file())

    def _best_answers(self, cell: Cell, records: Path, folder: Path) -> tuple[Path, float]:
        """Sample answers by the start, keep the best of each study; returns their file and the processor seconds."""
        arm, out = self.study.arms[cell.arm], records.parent / "sampled" / f"{cell.name}.json"
        out.parent.mkdir(exist_ok=True)
        script = Path(__file__).with_name("study_sampling.py")
        command: list[Any] = [sys.executable, script, self._start(cell), records, out, "--answers", arm.sample]
        command += ["--studies", arm.sampled_studies, "--seed", cell.seed, "--images", self.records_folder(records)]
        command += ["--max-new-tokens", ANSWER_TOKENS]
        return out, measured(command, folder / "sampling.log", folder)

    def _evaluate(self, cell: Cell) -> Path:
        """Ask the cell's checkpoint about the held-out studies; returns the folder of the evaluation."""
        target = self.checkpoint(cell).parent
        out = target / "evaluation"
        command = [sys.executable, "-m", "umed_plugin.cli", "evaluate", self.checkpoint(cell), "--batch-size", 50]
        command += ["--benchmark", self.records(cell.seed, cell.variant), "--out", out]
        command += ["--image-cache", self._demo(cell.seed).out / "images"]
        measured([*command, "--max-new-tokens", ANSWER_TOKENS], target / "evaluation.log", target)
        return out

    def _equal_steps(self, cell: Cell, flags: Flags, spent: float) -> int:
        """How many steps of stage 1 take the budget's processor time, after ``spent`` seconds of it.

        The budget's row says what plain steps took right after it, so other work on the machine, or another machine, cancels out.
        """
        of = budget_of(self.study, cell)
        about = self.rows.read(of) or self._checkpoint(of)
        if "reference_step" not in about:
            raise UmedError(
                f"{of.name}: its row lacks reference_step: it was no budget then. Remove the row, and try again."
            )
        step, start = about["reference_step"], about.get("reference_start")
        if start is None or spent:  # measured here: `spent`, and the start of a row of an earlier version
            here = self._plain_pace(cell)
            there = step / here["reference_step"]
            start, spent = here["reference_start"] * there if start is None else start, spent * there
        left = about["processor_seconds"] - spent - start
        return max(round(left / (step * self._times_plain(cell, flags))), 1)

    def _plain_pace(self, cell: Cell) -> dict[str, float]:
        """Processor seconds of a start and of a plain step of stage 1, measured now."""
        pace = self._measure_pace(cell, self._plain())
        return {"reference_start": round(pace["start"], 2), "reference_step": round(pace["step"], 4)}

    def _plain(self) -> Flags:
        """The flags of a plain step of stage 1: the study's own alone."""
        return {**self.study.flags, **self.study.stages.get(1, {})}

    def _times_plain(self, cell: Cell, flags: Flags) -> float:
        """How many times a plain step's processor seconds a step of stage 1 under these flags takes, measured once, in turn.

        Validation is not in it: an arm of equal time is given its steps, and has none.
        """
        counted, plain = ({k: v for k, v in f.items() if k not in UNTIMED} for f in (flags, self._plain()))
        if counted == plain:
            return 1.0
        name = hashlib.sha256(json.dumps([counted, plain], sort_keys=True).encode()).hexdigest()[:8]
        file = self.work / f"times-{name}.json"
        with self._measuring:
            if not file.is_file():
                turns = [self._measure_pace(cell, of)["step"] for of in (self._plain(), flags, flags, self._plain())]
                times = (turns[1] + turns[2]) / (turns[0] + turns[3])
                files.write_json(file, {"flags": counted, "turns": turns, "times": times})
            return float(files.read_object(file)["times"])

    def _measure_pace(self, cell: Cell, flags: Flags) -> dict[str, float]:
        """Processor seconds of a start and of a step of stage 1, from two lengths."""
        start, records = self.base(cell.seed), self._labelled(cell)
        seconds = {}
        for steps in (SHORT, LONG):
            output = self.work / "pace" / f"{steps}-{time.time_ns()}" / CHECKPOINT
            seconds[steps] = self._run(cell.seed, start, 1, records, output, flags, steps)
            shutil.rmtree(output.parent)
        step = max((seconds[LONG] - seconds[SHORT]) / (LONG - SHORT), 1e-3)
        return {"start": max(seconds[SHORT] - SHORT * step, 0.0), "step": step}

    def _alone(self, path: Path) -> Any:
        """Only one thread makes a path."""
        return self._locks[path]


def held(folder: Path) -> Any:
    """The folder for one study at a time."""
    return locked(folder, inside=True, busy="another study is running in this folder")
