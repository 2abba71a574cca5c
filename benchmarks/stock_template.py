"""The demo's checkpoint asked by stock LLaVA, under its own template, with the plugin not importable.

Prints the held-out mean IoU and accuracy with the plugin (``umed_mistral``) and with stock LLaVA (``mistral_instruct``), and
their difference. After ``make demo OUT=runs/demo``:

    python benchmarks/stock_template.py runs/demo
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from umed_plugin.data.records import load_records, record_geometry
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.grounding.scoring import score_answer

CHUNKS = 2  # one process a core


def ask_stock_llava(checkpoint: Path, data: Path, records: list[dict[str, Any]], work: Path) -> dict[str, str]:
    """Record id -> answer of stock LLaVA."""
    work.mkdir(exist_ok=True)
    questions = work / "questions.jsonl"
    lines = [
        {
            "question_id": record["id"],
            "image": record["image"],
            "text": record["conversations"][0]["value"].replace("<image>", "").strip(),
        }
        for record in records
    ]
    questions.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    processes, files = [], []
    for chunk in range(CHUNKS):
        files.append(work / f"answers-{chunk}.jsonl")
        arguments = {
            "model_path": checkpoint,
            "image_folder": data,
            "question_file": questions,
            "answers_file": files[-1],
        }
        settings = {**{key: str(value) for key, value in arguments.items()}, "num_chunks": CHUNKS, "chunk_idx": chunk}
        script = Path(__file__).resolve().with_name("stock_vqa.py")
        with open(work / f"stock-{chunk}.log", "wb") as log:
            command = [sys.executable, "-I", str(script), json.dumps(settings)]
            processes.append(subprocess.Popen(command, cwd=work, stdout=log, stderr=subprocess.STDOUT))
    failed = [i for i, process in enumerate(processes) if process.wait() != 0]
    if failed:
        raise SystemExit(f"stock LLaVA failed: see {work}/stock-{failed[0]}.log")
    answers = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    return {answer["question_id"]: answer["text"] for answer in answers}


def score(records: list[dict[str, Any]], answers: dict[str, str]) -> dict[str, float]:
    """Mean IoU over the studies with a lesion and accuracy over all, as `umed evaluate` defines them."""
    scores = [score_answer(answers[record["id"]], record, record_geometry(record)) for record in records]
    with_lesion = [one.set_iou for one in scores if one.n_true]
    return {
        "mean_iou": sum(with_lesion) / len(with_lesion),
        "accuracy": sum(one.accuracy for one in scores) / len(scores),
    }


def main(demo: Path) -> None:
    """Print both metrics and their difference."""
    demo = demo.resolve()
    data, checkpoint = demo / "data", demo / "checkpoint" / "llava-mistral-umed"
    records = [record for record in load_records(data / "records.json") if record["split"] == "test"]
    with_plugin = Evaluation.load(demo / "evaluation" / "rewarding").metrics
    stock = score(records, ask_stock_llava(checkpoint, data, records, demo / "stock"))
    for name, value in stock.items():
        ours = with_plugin[name]["value"]
        print(f"{name}: plugin {ours:.3f}, stock LLaVA {value:.3f}, difference {value - ours:+.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
