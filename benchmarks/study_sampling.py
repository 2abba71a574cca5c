"""Rejection sampling: the best of K answers that a checkpoint draws to each training study, as records for stage 1.

    python benchmarks/study_sampling.py CHECKPOINT RECORDS.json OUT.json --answers 8 --studies 400

An answer's score is the demo's: 4 for exactly the true classes, and twice the set IoU. Studies whose best answer names other
classes are left out. `study.py` trains on the file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.data.records import load_records, record_geometry, save_records
from umed_plugin.errors import UmedError, say
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.patches import prepare_llava

BATCH = 24


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, choose and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path, help="folder of the records' images (default: that of the file)")
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--studies", type=int, default=400, help="at most this many")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--max-new-tokens", type=int, default=104)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    prepare_llava()
    records = load_records(options.records)
    train = [record for record in records if record["split"] == "train"]
    every = max(len(train) // options.studies, 1)
    best = best_answers(options, train[::every][: options.studies])
    if not best:
        raise UmedError("none of the sampled answers names the true classes.")
    save_records(best + [record for record in records if record["split"] != "train"], options.out)
    say(f"{len(best)} studies have a right answer among {options.answers}")


def best_answers(options: Any, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with the best of their sampled answers in place of the reference."""
    import torch

    from umed_plugin.checkpoints.folder import UMED_TEMPLATES
    from umed_plugin.model.answerer import Answerer, AnswererSettings
    from umed_plugin.model.forward import decode_answers, embed_prompts
    from umed_plugin.model.sampling import SamplingSettings, generate

    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    answerer = Answerer(options.checkpoint, AnswererSettings(templates=UMED_TEMPLATES, device="cpu"))
    folder = options.images or options.records.parent
    eos = answerer.tokenizer.eos_token_id
    settings = SamplingSettings(options.max_new_tokens, eos, options.temperature, 1.0, options.answers)
    chosen = []
    with torch.no_grad():
        for first in range(0, len(records), BATCH):
            batch = records[first : first + BATCH]
            features = answerer.features(
                [os.path.join(folder, record["image"]) for record in batch], [None] * len(batch)
            )
            ids = [answerer.prompt_ids(_question(record)) for record in batch]
            drawn = generate(answerer.model, embed_prompts(answerer.model, ids, features), settings)
            texts = decode_answers(answerer.tokenizer, drawn)
            for number, record in enumerate(batch):
                chosen.append(best_of(record, texts[number * options.answers : (number + 1) * options.answers]))
    return [record for record in chosen if record is not None]


def _question(record: dict[str, Any]) -> str:
    return str(record["conversations"][0]["value"]).replace("<image>", "").strip()


def best_of(record: dict[str, Any], texts: Sequence[str]) -> dict[str, Any] | None:
    """The record with the best of the answers; None if that names other classes than the true ones."""
    scores = [score_answer(text, record, record_geometry(record)) for text in texts]
    values = [4 * score.accuracy + 2 * (score.set_iou if score.n_true else 0.0) for score in scores]
    best = max(range(len(texts)), key=values.__getitem__)
    if scores[best].accuracy < 1:
        return None
    turns = [record["conversations"][0], {**record["conversations"][1], "value": texts[best]}]
    return {**record, "conversations": turns}


if __name__ == "__main__":
    main()
