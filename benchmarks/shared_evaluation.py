"""``umed evaluate`` by several ranks against one process: the same files, and how much time they save.

    python benchmarks/shared_evaluation.py [--ranks 2] [--records 60]

Each process computes on one thread. Each rank loads the checkpoint for itself, so the ratio grows with the number of records.
The model has a tower of 24 x 24 patches and a language model of 6 layers of width 256, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ratios, seconds, stack
from PIL import Image

from umed_plugin import files
from umed_plugin.commands.demo import tiny_checkpoint
from umed_plugin.patches import prepare_llava

COMPARED = ("evaluation.json", "predictions.jsonl")


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--records", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    prepare_llava()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(args, Path(folder))))


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tiny_checkpoint.IMAGE_SIZE = 24 * tiny_checkpoint.PATCH_SIZE
    checkpoint = tiny_checkpoint.make_checkpoint(folder / "llava-mistral", hidden_size=256, layers=6)
    records = _records(folder, args.records)
    command = [
        sys.executable,
        "-m",
        "umed_plugin.cli",
        "evaluate",
        str(checkpoint),
        "--benchmark",
        str(records),
        "--quiet",
    ]
    command += ["--batch-size", "8", "--max-new-tokens", str(args.max_new_tokens), "--device", "cpu", "--out"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    ]
    launcher += ["--nproc_per_node", str(args.ranks), "--no-python"]
    times, equal = [], []
    for turn in range(args.repetitions):
        alone, shared = folder / f"alone{turn}", folder / f"shared{turn}"
        one, several = [*command, str(alone)], [*launcher, *command, str(shared)]
        times.append((seconds(partial(_run, one)), seconds(partial(_run, several))))
        equal += [(alone / name).read_bytes() == (shared / name).read_bytes() for name in COMPARED]
    found = ratios(*zip(*times))
    found.pop("processor_ratio")  # of this process, which only waits
    settings = {key: value for key, value in vars(args).items() if key != "repetitions"}
    return {"same_files": all(equal), **found, "settings": settings, "stack": stack()}


def _run(command: list[str]) -> None:
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])


def _records(folder: Path, count: int) -> Path:
    """Records with one lesion each, over noise."""
    rng, records = np.random.default_rng(0), []
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (192, 192, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        turns = [("human", "<image>\nWhat is abnormal?"), ("gpt", "At [0.25, 0.25, 0.50, 0.50] lies a cyst.")]
        records.append({
            "id": str(index), "image": f"{index}.png", "image_size": [192, 192], "split": "test",
            "conversations": [{"from": role, "value": value} for role, value in turns],
            "objects": {"ref": ["cyst"], "bbox": [[48, 48, 96, 96]], "bbox_type": "real"},
            "terms": {"cyst": ["cyst"]}, "answer_type": "grounded", "patient": str(index), "source": "noise",
            "provenance": {"image_aspect_ratio": "pad"},
        })  # fmt: skip
    files.write_json(folder / "records.json", records)
    return folder / "records.json"


if __name__ == "__main__":
    main()
