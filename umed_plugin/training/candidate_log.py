"""A table of sampled answers with their rewards, every few steps, logged where the run's metrics are.

``candidates.jsonl`` in the output folder is always written. If ``--report_to`` names W&B or TensorBoard, the table goes there
too, through the trainer's own callbacks: project, run and folder are those of its metrics.

How to run: ``--umed_log_candidates 50`` in stage 2, with ``--report_to tensorboard`` or ``wandb``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from umed_plugin.files import append_json_lines

NAME = "candidates"


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
    append_json_lines(Path(output_dir) / "candidates.jsonl", [line], durable=False)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(NAME, as_markdown(line), step)
        if isinstance(callback, WandbCallback):
            _to_wandb(line)


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
