"""Both stages from end to end: a small checkpoint that names abnormalities learns to show where they are.

Steps: generated studies, a small checkpoint and its prior, records by the shipped recipe ``demo_studies``, stage 1 (full
fine-tuning) and stage 2 through ``umed-run`` with LLaVA's own training script, evaluation on held-out studies before, between
and after, export. Runs on a CPU in float32, without network. Content of the folder afterwards:

- ``checkpoint/llava-mistral-umed/``: the upgraded checkpoint. Its name makes stock LLaVA choose the right loader.
- ``summary.json``: metrics of ``base``, ``instruction_tuning``, ``rewarding`` with confidence intervals, ``comparison`` (stage 2
  minus stage 1, paired), ``seed`` and ``seconds``; ``evaluation/<stage>/``: every answer.
- ``report.html``: curves, before and after, studies with boxes and attention (`umed_plugin.commands.report`);
  ``before_after.png``.
- ``data/``: studies and records; ``runs/``: base checkpoint and both stages; ``logs/``: output of the trainings.

How to run: ``umed demo --out DIR``. The same seed gives the same summary, except for ``seconds``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.commands.processes import importable, run_logged
from umed_plugin.errors import UmedError
from umed_plugin.files.locks import INSIDE, locked
from umed_plugin.terminal.console import console as make_console
from umed_plugin.terminal.progress import Steps

STAGES = ("base", "instruction_tuning", "rewarding")
NAME = "llava-mistral-umed"
TUNING_BATCH = 16


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults take less than 10 minutes on two cores."""

    tuning: int = 2000
    rewarding: int = 1000
    val: int = 40
    test: int = 400
    prior_epochs: float = 2
    prior_lr: float = 2e-3
    tuning_epochs: float = 5
    tuning_lr: float = 3e-3
    rewarding_steps: int = 130
    rewarding_lr: float = 1e-4
    queries: int = 12
    candidates: int = 8
    max_new_tokens: int = 104
    # With tensors this small, two processes of one thread each train nearly twice as fast as one process of two threads. The
    # number is fixed, since another number would round sums differently and so change a seed's summary.
    processes: int = 2


def run_demo(
    out: Path | str, seed: int = 0, settings: DemoSettings | None = None, console: Any = None
) -> dict[str, Any]:
    """Run the demo under ``out``, write ``summary.json`` and return its content.

    Args:
        out: a folder that does not exist or is empty.
        seed: of studies, weights and training.
        settings: sizes.
        console: a rich console for progress and the table; by default the terminal.

    Raises:
        UmedError: the folder is not empty, or a training run failed (the message names its log).
    """
    out = Path(out).resolve()
    with locked(out, inside=True, busy="another `umed demo` is running in this folder"):
        if any(entry.name != INSIDE for entry in out.iterdir()):
            raise UmedError(
                f"{out}: is not empty and is left as it is. Choose another --out, or remove the folder first."
            )
        import torch

        settings = settings or DemoSettings()
        torch.set_num_threads(settings.processes)
        with Steps(console or make_console(wide_in_pipes=True)) as steps:
            return DemoRun(out, seed, settings, steps).run()


class DemoRun:
    """One demo: its steps in the order of `run`. The benchmarks call single steps.

    Args:
        out: folder of the demo.
        seed: of studies, weights and training.
        settings: sizes.
        steps: shows the progress.
    """

    def __init__(self, out: Path, seed: int, settings: DemoSettings, steps: Steps) -> None:
        self.out, self.seed, self.settings, self.steps = out, seed, settings, steps
        self.data, self.runs = out / "data", out / "runs"
        self.tiny, self.base = self.checkpoint("untrained"), self.checkpoint("base")
        self.tuning_records, self.rewarding_records = self.data / "tuning.json", self.data / "rewarding.json"
        self.exported = out / "checkpoint" / NAME

    def checkpoint(self, name: str) -> Path:
        """Folder of a training run's checkpoint; stock LLaVA chooses the class by the folder's name."""
        return self.runs / f"{name}-llava-mistral"

    def run(self) -> dict[str, Any]:
        """Run all steps; return the summary."""
        from umed_plugin.checkpoints.exporting import export

        began = time.monotonic()
        records = self.records()
        self.base_checkpoint()
        tuned = self.instruction_tuning()
        rewarded = self.rewarding(tuned)
        self.steps.begin("exporting")
        export(rewarded, self.exported, like=self.base, with_tower=True)
        checkpoints = (self.base, tuned, self.exported)
        evaluations = {name: self.evaluate(name, path, records) for name, path in zip(STAGES, checkpoints)}
        return self._summarise(evaluations, began)

    def records(self) -> list[dict[str, Any]]:
        """Draw the studies and build records of all splits with the shipped recipe."""
        from umed_plugin.commands.demo.studies import make_studies
        from umed_plugin.data.build import build_records
        from umed_plugin.data.recipes.recipe import load_recipe
        from umed_plugin.data.records import save_records

        sizes = self.settings
        self.steps.begin("drawing DICOM, NIfTI and PNG studies", "study")
        studies = self.data / "studies"
        train = sizes.tuning + sizes.rewarding
        make_studies(studies, seed=self.seed, train=train, val=sizes.val, test=sizes.test, progress=self.steps.update)
        self.steps.begin("building records with recipe demo_studies")
        records = build_records(
            load_recipe("demo_studies"), out_dir=self.data, image_aspect_ratio="pad", seed=self.seed, data_root=studies
        )
        save_records(records, self.data / "records.json")
        # The stages train on different studies: stage 1 memorizes its own. On others its answers are wrong as often as on
        # held-out studies, so rewards can tell right from wrong.
        train_records = [record for record in records if record["split"] == "train"]
        save_records(train_records[: sizes.tuning], self.tuning_records)
        save_records(train_records[sizes.tuning :], self.rewarding_records)
        return records

    def base_checkpoint(self) -> None:
        """Make the small checkpoint and train it on captions: what a medical LLaVA knows before the plugin is used."""
        from umed_plugin.checkpoints.exporting import export
        from umed_plugin.commands.demo.prior import caption_records, corpus
        from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
        from umed_plugin.data.records import load_records

        self.steps.begin("base checkpoint: captions without boxes", note=f"log: {self._log('captions')}")
        make_checkpoint(self.tiny, seed=self.seed, corpus=corpus(self.seed))
        captions = self.data / "captions.json"
        files.write_json(captions, caption_records(load_records(self.tuning_records), self.seed))
        sizes = self.settings
        captioned = self._train(
            "captions",
            ["--model_name_or_path", self.tiny, "--data_path", captions, "--version", "mistral_instruct"]
            + ["--num_train_epochs", sizes.prior_epochs, "--learning_rate", sizes.prior_lr]
            + ["--per_device_train_batch_size", TUNING_BATCH // sizes.processes],
        )
        export(captioned, self.base, like=self.tiny)

    def instruction_tuning(self, name: str = "tuned", start: Path | None = None, flags: Sequence[Any] = ()) -> Path:
        """Train stage 1 from ``start`` (default: the base); ``flags`` come last and override. Returns the checkpoint."""
        sizes = self.settings
        self.steps.begin("stage 1: instruction tuning", note=f"log: {self._log(name)}")
        return self._train(
            name,
            ["--model_name_or_path", start or self.base, "--data_path", self.tuning_records]
            + ["--version", "umed_mistral", "--umed_stage", "instruction_tuning"]
            + ["--num_train_epochs", sizes.tuning_epochs, "--learning_rate", sizes.tuning_lr]
            + ["--per_device_train_batch_size", TUNING_BATCH // sizes.processes, *flags],
        )

    def rewarding(self, start: Path, name: str = "rewarded", flags: Sequence[Any] = ()) -> Path:
        """Train stage 2 from a checkpoint of stage 1; ``flags`` come last and override. Returns the checkpoint."""
        sizes = self.settings
        self.steps.begin("stage 2: rewarding", note=f"log: {self._log(name)}")
        # Full fine-tuning: in a model this narrow, an adapter has about as many weights as it saves.
        return self._train(
            name,
            ["--model_name_or_path", start, "--data_path", self.rewarding_records]
            + ["--version", "umed_mistral", "--umed_stage", "rewarding", "--umed_algorithm", "grpo"]
            + ["--umed_num_candidates", sizes.candidates, "--umed_max_new_tokens", sizes.max_new_tokens]
            # At temperature 1, the digits of an uncertain box are noise, and large boxes that hedge against it are rewarded. At a
            # lower temperature the rewarded boxes are close to the greedy one.
            + ["--umed_temperature", 0.5, "--umed_kl_coef", 0.015]
            # Scaled per question, the difference of two boxes by noisy digits would weigh as much as a right against a wrong
            # diagnosis, and the model would unlearn diagnoses.
            + ["--umed_advantage_scale", "batch"]
            # The recipe's template writer draws phrases at random; the lexical judge would reward guessing them.
            + ["--umed_judge", "classes", "--umed_reward_weights", "4,2,1"]
            + ["--umed_log_candidates", max(sizes.rewarding_steps // 13, 1)]
            + ["--max_steps", sizes.rewarding_steps, "--learning_rate", sizes.rewarding_lr, "--warmup_ratio", 0.1]
            + ["--per_device_train_batch_size", sizes.queries // sizes.processes, *flags],
        )

    def _train(self, name: str, arguments: Sequence[Any]) -> Path:
        """Run LLaVA's training script under umed-run; the command and its output go to ``logs/NAME.log``."""
        # Not --standalone: before torch 2.1 it uses one fixed port, on which two demos would collide.
        torchrun = ["-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        torchrun += ["--nproc_per_node", str(self.settings.processes)]
        output = self.checkpoint(name)
        script = [sys.executable, *torchrun, "-m", "llava.train.train_mem", "--output_dir", output]
        parts = [sys.executable, "-m", "umed_plugin.launch", *script, *self._common_arguments(), *arguments]
        # cwd: libraries create folders such as runs/ and wandb/, which belong in the demo's folder.
        run_logged(
            [str(part) for part in parts],
            self._log(name),
            f"training ({name})",
            cwd=self.out,
            environment=environment(),
            progress=self.steps.update,
        )
        return output

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def _common_arguments(self) -> list[Any]:
        return [
            *("--vision_tower", self.tiny / "vision_tower", "--image_folder", self.data),
            *("--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2, "--image_aspect_ratio", "pad"),
            *("--mm_use_im_start_end", False, "--mm_use_im_patch_token", False, "--model_max_length", 512),
            *("--lr_scheduler_type", "cosine", "--warmup_ratio", 0.03, "--weight_decay", 0.0),
            *("--use_cpu", True, "--dataloader_num_workers", 0, "--lazy_preprocess", True, "--seed", self.seed),
            *("--logging_steps", 10, "--save_strategy", "no", "--report_to", "none"),
        ]

    def evaluate(self, stage: str, checkpoint: Path, records: Sequence[dict[str, Any]]) -> Any:
        """Evaluate a checkpoint on the held-out studies; the answers are saved under ``evaluation/STAGE``."""
        from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
        from umed_plugin.evaluation.evaluation_run import EvaluationSettings
        from umed_plugin.evaluation.evaluator import evaluate_questions
        from umed_plugin.patches import prepare_llava

        prepare_llava()
        self.steps.begin(f"evaluating on held-out studies: {stage.replace('_', ' ')}", "question")
        held_out = [record for record in records if record["split"] == "test"]
        settings = EvaluationSettings(batch_size=50, max_new_tokens=self.settings.max_new_tokens, device="cpu")
        questions = record_questions(held_out, self.data)
        evaluation = evaluate_questions(checkpoint, RECIPE, questions, settings, progress=self.steps.update)
        evaluation.save(self.out / "evaluation" / stage)
        return evaluation

    def _summarise(self, evaluations: dict[str, Any], began: float) -> dict[str, Any]:
        from umed_plugin.commands.report.before_after import write_before_after
        from umed_plugin.commands.report.page import write_report
        from umed_plugin.evaluation.benchmarks.recipe_cases import headline
        from umed_plugin.evaluation.results import compare
        from umed_plugin.evaluation.stages_table import stages_notes, stages_table

        stages = {stage: headline(evaluations[stage]) for stage in STAGES}
        comparison = compare(evaluations["instruction_tuning"], evaluations["rewarding"])
        self.steps.begin("writing the report")
        report = write_report(self.out, progress=lambda _what, done, total: self.steps.update(done, total))
        write_before_after(self.out, self.out / "before_after.png")
        self.steps.end()
        summary = {**stages, "comparison": comparison, "seed": self.seed, "seconds": round(time.monotonic() - began, 1)}
        files.write_json(self.out / "summary.json", summary)
        self.steps.console.print(stages_table(stages, comparison))
        for line in stages_notes(stages, comparison):
            self.steps.console.print(line, style="dim", soft_wrap=True)
        self.steps.console.print(
            f"checkpoint: {self.exported}\nsummary: {self.out / 'summary.json'}\nreport: {report}", soft_wrap=True
        )
        return summary


def environment() -> dict[str, str]:
    """This process's environment, with the plugin importable from a checkout, a fixed number of threads and no network."""
    return {
        **importable(),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
