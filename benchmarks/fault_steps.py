"""The steps of the fault campaign (`faults.py`): what each reads, its command, and what must be equal at its end."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.umed_runs import OWN_REWARD, train_flags, weights  # noqa: E402

UMED = [sys.executable, "-m", "umed_plugin.cli"]
TRAIN = [sys.executable, "-m", "umed_plugin.launch", "python", "-m", "llava.train.train_mem"]
LORA = ["--lora_enable", "True", "--lora_r", "4"]
GRPO = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 4 --umed_max_new_tokens 12 --learning_rate 1e-3 --max_steps 8 --save_steps 1 "
    "--umed_rewards relevance,localization,half:half"
)
# Two updates of two minibatches per rollout: checkpoints fall between the updates of one.
PPO = shlex.split(
    "--umed_algorithm ppo --umed_updates_per_rollout 2 --umed_minibatches_per_rollout 2 --umed_kl_target 0.05 "
    "--umed_kl_horizon 50 --umed_value_learning_rate 1e-2"
)
UPGRADE = {
    "instruction_tuning.steps": 4,
    "instruction_tuning.save_steps": 2,
    "rewarding.steps": 3,
    "rewarding.save_steps": 1,
    **{f"{stage}.batch_size": 2 for stage in ("instruction_tuning", "rewarding")},
    **{f"{stage}.accumulation": 1 for stage in ("instruction_tuning", "rewarding")},
    "rewarding.candidates": 4,
    "rewarding.learning_rate": 1e-2,
    "rewarding.max_new_tokens": 8,
    "evaluation.max_new_tokens": 8,
}
CONCURRENCY = 4
State = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What the steps read, below ``folder``. Each is made when a step first asks for it, and anew if its making was cut off."""

    folder: Path

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        place, done = self.folder / name, self.folder / f".made-{name}"
        if not done.is_file():
            shutil.rmtree(place, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            make(place)
            done.touch()
        return place

    @property
    def studies(self) -> Path:
        """Generated DICOM, NIfTI and PNG studies."""
        from umed_plugin.commands.demo.studies import make_studies

        return self._made("studies", lambda place: make_studies(place, seed=0, train=40, val=4, test=4))

    @property
    def checkpoint(self) -> Path:
        """A small ``llava_mistral`` checkpoint with random weights."""
        from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

        return self._made("tiny-llava-mistral", make_checkpoint)

    @property
    def lora(self) -> Path:
        """A LoRA folder over `checkpoint`."""
        from support.taught import write_lora

        return self._made("llava-lora", lambda place: write_lora(self.checkpoint, place))

    @property
    def records(self) -> Path:
        """Records to train on; beside them a reward that differs between the answers of random weights."""
        from support.records import grounded_records

        def make(place: Path) -> None:
            grounded_records(place)
            (place / "half.py").write_text(OWN_REWARD)

        return self._made("data", make) / "records.json"

    @property
    def labels(self) -> Path:
        """Pictures with a label and no box, normal ones, and their recipe with ``pseudo_boxes``."""
        from labels_day import RECIPE, draw

        def make(place: Path) -> None:
            draw(place / "images", labelled=40, normal=16, seed=0)
            (place / "labels.yaml").write_text(RECIPE.replace("SEED", "0").replace("STEPS", "60"))

        return self._made("labels", make)

    @property
    def asked(self) -> Path:
        """Records to evaluate on."""
        from support.records import evaluated_records

        def make(place: Path) -> None:
            place.mkdir()
            (place / "records.json").write_text(json.dumps(evaluated_records(place, 40)))

        return self._made("asked", make) / "records.json"

    @property
    def written(self) -> Path:
        """A recipe for the writer, and its records as templates write them."""
        from support.writer_runs import build_templates
        from support.writer_server import write_data

        def make(place: Path) -> None:
            place.mkdir()
            write_data(place, 40)
            build_templates(place)

        return self._made("written", make)


@dataclass(frozen=True)
class Step:
    """A command that is killed.

    Attributes:
        command: output folder, address of the server -> words.
        state: output folder -> what must be equal at the end.
        result: the file or folder whose presence says that the run is done; None: it says so by its exit status alone.
        ledger: of replies, in the output folder; None: no server.
        ready: output folder -> what the command expects there.
    """

    name: str
    command: Callable[[Path, str], list[Any]]
    state: Callable[[Path], State]
    result: str | None = None
    ledger: str | None = None
    ready: Callable[[Path], None] = lambda out: None
    forks_too: bool = False


def file_states(out: Path) -> State:
    """Digest of each file, with the folder's own path taken out.

    Half-written files of killed writers do not count, nor does the note of what was checked, which holds the files' times.
    """
    own = [str(out).encode(), str(out.resolve()).encode(), json.dumps(str(out))[1:-1].encode()]
    found = {}
    for file in sorted(out.rglob("*")):
        if file.is_file() and not file.name.endswith((".partial", ".lock", ".umed_checked.jsonl")):
            content = file.read_bytes()
            for path in own:
                content = content.replace(path, b"OUT")
            found[str(file.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def some_files(*names: str) -> Callable[[Path], State]:
    """`file_states` of some files alone."""
    return lambda out: {name: state for name, state in file_states(out).items() if name in names}


def trained(out: Path) -> State:
    """All weights at the end of a training."""
    return dict(weights(out))


def upgraded(out: Path) -> State:
    """Weights, figures and answers of an upgrade."""
    from umed_plugin.checkpoints.folder import read_tensors, weight_files

    (result,) = (out / "checkpoint").iterdir()
    state: State = {name: tensor for file in weight_files(result) for name, tensor in read_tensors(file).items()}
    state["summary"] = json.loads((out / "summary.json").read_text())
    for file in sorted((out / "evaluation").glob("*/predictions.jsonl")):
        lines = [json.loads(line) for line in file.read_text().split("\n") if line]
        state[file.parent.name] = [{key: value for key, value in line.items() if key != "image"} for line in lines]
    return state


def difference(expected: State, found: State) -> float:
    """0.0: bit for bit equal. Else the largest difference of a weight; infinite if anything else differs."""
    import torch

    if set(expected) != set(found):
        return float("inf")
    largest = 0.0
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor):
            largest = largest if value == found[name] else float("inf")
        elif value.shape != found[name].shape:
            return float("inf")
        elif not torch.equal(value, found[name]):
            largest = max(largest, float((value.double() - found[name].double()).abs().max()))
    return largest


def _flags(inputs: Inputs, out: Path, *more: str) -> list[str]:
    """`train_flags` for paths that may hold spaces, at which it splits."""
    names = {
        "@mistral": inputs.checkpoint,
        "@data/records.json": inputs.records,
        "@data": inputs.records.parent,
        "@out": out,
    }
    words = train_flags(Path("@mistral"), Path("@data/records.json"), Path("@out"), *more)
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    return words


def steps(inputs: Inputs) -> dict[str, Step]:
    """All steps by name."""

    def train(*more: str) -> Callable[[Path, str], list[Any]]:
        return lambda out, _server: [*TRAIN, *_flags(inputs, out, *more)]

    def judge(server: str) -> list[str]:
        return [
            "--umed_judge",
            "openai:the-model",
            "--umed_judge_base_url",
            server,
            "--umed_judge_concurrency",
            str(CONCURRENCY),
        ]

    def copy_images(out: Path) -> None:
        if not (out / "built.json").exists():
            shutil.copytree(inputs.written / "out", out, dirs_exist_ok=True)

    from support.writer_runs import WRITING

    writer = ["--writer", "openai", "--model", "the-model", "--concurrency", CONCURRENCY, "--base-url"]
    stage1 = ("--umed_stage", "instruction_tuning", "--max_steps", "12", "--save_steps", "2", *LORA)
    sets = [word for key, value in UPGRADE.items() for word in ("--set", f"{key}={value}")]
    found = [
        Step("build", lambda out, _: [*UMED, "recipe", "build", "demo_studies", "--data-root", inputs.studies,
             "--out", out / "train.json"], file_states, "train.json"),
        Step("pseudo_boxes", lambda out, _: [*UMED, "recipe", "build", inputs.labels / "labels.yaml", "--data-root",
             inputs.labels / "images", "--out", out / "train.json", "--tower", inputs.checkpoint],
             some_files("train.json", "train.pseudo_boxes.png"), "train.json"),
        Step("writer", lambda out, server: [sys.executable, "-c", WRITING, "recipe", "build", inputs.written / "recipe.yaml",
             "--out",
             out / "train.json", *writer, server], some_files("train.json"), "train.json", "train.ledger.jsonl", copy_images),
        Step("stage1", train(*stage1), trained),
        Step("grpo", train(*GRPO), trained),
        Step("ppo", train(*GRPO, *PPO, *LORA), trained),
        Step("judge", lambda out, server: [*train(*GRPO)(out, ""), *judge(server)], trained, None, "judge.jsonl"),
        Step("merge", lambda out, _: [*UMED, "merge", inputs.lora, "--out", out / "llava-mistral-merged", "--overwrite"],
             file_states, "llava-mistral-merged"),
        Step("convert", lambda out, _: [*UMED, "convert", inputs.checkpoint, "--out", out / "hf-llava", "--overwrite"],
             file_states, "hf-llava"),
        Step("evaluate", lambda out, _: [*UMED, "evaluate", inputs.checkpoint, "--benchmark", inputs.asked, "--out", out,
             "--max-new-tokens", 6, "--batch-size", 2], file_states, "evaluation.json"),
        Step("upgrade", lambda out, _: [*UMED, "upgrade", inputs.checkpoint, "--recipe", "demo_studies", "--data-root",
             inputs.studies, "--rewards", "relevance,localization", "--out", out, *sets], upgraded, "report.html",
             forks_too=True),
    ]  # fmt: skip
    return {step.name: step for step in found}
