"""A table of sampled answers with their rewards, every few steps, logged where the run's metrics are.

``candidates.jsonl`` in the output folder is always written. If ``--report_to`` names W&B or TensorBoard, the table goes there
too, through the trainer's own callbacks: project, run and folder are those of its metrics.

With ``--umed_dynamic_sampling``, a rollout has several samplings. ``extra_sampling`` numbers those after the first, and
``learnt_from: false`` marks answers that were thrown away. A run that starts or goes on leaves out the lines of steps that it
takes again: `CandidateLogStart`.

How to run: ``--umed_log_candidates 50`` in stage 2, with ``--report_to tensorboard`` or ``wandb``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from umed_plugin.files import append_json_lines, parse_json, write_bytes

NAME = "candidates"
FILE = "candidates.jsonl"


def log_candidates(
    step: int,
    record: Mapping[str, Any],
    texts: Sequence[str],
    rewards: Sequence[float],
    terms: Mapping[str, Sequence[float | None]],
    output_dir: str | Path,
    callbacks: Iterable[Any],
    image: str | None = None,
    recipe: tuple[Mapping[str, Sequence[float]], Mapping[str, float]] | None = None,
    *,
    extra_sampling: int = 0,
    learnt_from: bool = True,
) -> None:
    """Write the K candidates of one query.

    Args:
        step: optimizer steps done.
        record: of the query.
        texts: K answers.
        rewards: their K rewards, as the objective uses them.
        terms: reward name -> K values before normalisation and weights, None if the reward could not score.
        output_dir: of the run; ``candidates.jsonl`` there gets one more line.
        callbacks: the trainer's; those of TensorBoard and W&B get the table too.
        image: path of the query's image file, for `umed report`.
        recipe: what the reward is the sum of: reward name -> K normalised values, and reward name -> weight.
        extra_sampling: number of the further sampling of the rollout that the query is of; 0 for the first.
        learnt_from: False if dynamic sampling has thrown the answers away.
    """
    group = [
        {"text": text, "reward": reward, **{name: column[i] for name, column in terms.items()}}
        for i, (text, reward) in enumerate(zip(texts, rewards))
    ]
    study = {name: record[name] for name in ("source", "modality", "reading", "terms", "augmented") if name in record}
    if image is not None:
        # A report may be made in another folder than the run was started in.
        study["image"] = os.path.abspath(image)
        study["image_aspect_ratio"] = record["provenance"]["image_aspect_ratio"]
        question, *reference = (turn["value"] for turn in record["conversations"][:2])
        study["question"] = question.replace("<image>", "").strip()
        if reference:
            study["reference"] = reference[0]
    line = {"step": step, "id": record["id"], "true": record["objects"], "study": study, "candidates": group}
    if recipe is not None:
        line["normalised"], line["weights"] = recipe
    line |= {"extra_sampling": extra_sampling} if extra_sampling else {}
    line |= {} if learnt_from else {"learnt_from": False}
    append_json_lines(Path(output_dir) / FILE, [line], durable=False)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(NAME, as_markdown(line), step)
        if isinstance(callback, WandbCallback):
            _to_wandb(line)


class CandidateLogStart(TrainerCallback):
    """Lets the log of a run that starts, or goes on from a checkpoint, end where the run begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Leave out what an abandoned run has logged, in the first process."""
        if state.is_world_process_zero:
            leave_out_from(Path(args.output_dir) / FILE, state.global_step)


def leave_out_from(file: Path, step: int) -> None:
    """Leave out the lines of this optimizer step and later ones, and lines that a killed process left incomplete.

    The file is replaced as a whole, and only if a line goes: a crash leaves the old one or the new one.
    """
    if not file.is_file():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, step)]
    if len(kept) < len(lines):
        write_bytes(file, b"".join(kept))


def _is_before(line: bytes, step: int) -> bool:
    """Whether a line is whole, and of an earlier step."""
    try:
        found = parse_json(line)["step"]
    except (KeyError, TypeError, ValueError):
        return False
    return line.endswith(b"\n") and isinstance(found, int) and found < step


def as_markdown(line: Mapping[str, Any]) -> str:
    """One line of ``candidates.jsonl`` as a table, under the query's id and ground truth."""
    columns = list(line["candidates"][0])
    rows = [columns, ["---"] * len(columns), *([_cell(row[name]) for name in columns] for row in line["candidates"])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"`{line['id']}`, true: `{json.dumps(line['true'], ensure_ascii=False)}`\n\n{table}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).replace("|", "\\|").split())


def _to_wandb(line: Mapping[str, Any]) -> None:
    import wandb

    if wandb.run is None:  # the callback opens a run only in the main process
        return
    columns = ["id", *line["candidates"][0]]
    table = wandb.Table(columns=columns, data=[[line["id"], *row.values()] for row in line["candidates"]])
    # Without the step argument, like the trainer's callback: W&B refuses steps that go back.
    wandb.log({NAME: table, "train/global_step": line["step"]})
