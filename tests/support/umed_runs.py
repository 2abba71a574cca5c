"""Real, tiny training runs through ``umed-run`` for the tests: records on disk, the command line, and the end weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

# LLaVA's script in two processes. With --standalone torch 2.0 takes a fixed port, and two runs at a time would meet there.
TWO_PROCESSES = [
    *("torchrun", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--nproc_per_node", "2"),
    *("-m", "llava.train.train_mem"),
]
ROOT = Path(__file__).resolve().parents[2]


def write_records(folder: Path, count: int = 8, questions: int = 1) -> Path:
    """``count`` small images (64 x 48) and records with one or two questions each; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [
            ("human", "<image>\nIs there anything abnormal?"),
            ("gpt", f"There is one abnormal area at [0.1{i % 10}, 0.20, 0.35, 0.40]. It is a nodule."),
            ("human", "Where is it?"),
            ("gpt", "At the top left."),
        ]
        records.append(
            {
                "id": f"record-{i}",
                "image": f"{i}.png",
                "conversations": [{"from": who, "value": text} for who, text in turns[: 2 * questions]],
                "split": "train",
                "provenance": {"image_aspect_ratio": "pad"},
            }
        )
    file = folder / "records.json"
    file.write_text(json.dumps(records))
    return file


def train_flags(checkpoint: Path, records: Path, output: Path, *more: str) -> list[str]:
    """Flags of a short fp32 run on the CPU; ``more`` comes last and wins."""
    version = "umed_mistral" if "mistral" in checkpoint.name else "umed_v1"
    return (
        f"""
        --model_name_or_path {checkpoint} --version {version}
        --vision_tower {checkpoint}/vision_tower --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu
        --mm_use_im_patch_token False --data_path {records} --image_folder {records.parent} --image_aspect_ratio pad
        --output_dir {output} --per_device_train_batch_size 2 --use_cpu True --report_to none --logging_steps 1
        --model_max_length 512 --learning_rate 1e-3 --disable_tqdm True --save_total_limit 3
    """.split()
        + list(more)
    )


def umed_run(command: list[str], *, pythonpath: Path | None = None, **keywords: object) -> subprocess.CompletedProcess:
    """``umed-run COMMAND`` from a folder that is not the checkout; the plugin is found through the launcher alone."""
    return subprocess.run(
        [sys.executable, str(ROOT / "umed_plugin" / "launch.py"), *command]
        if keywords.pop("by_file", False)
        else [sys.executable, "-m", "umed_plugin.launch", *command],
        env=environment(*([pythonpath] if pythonpath else [])),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **keywords,
    )


def environment(*pythonpath: Path) -> dict[str, str]:
    """The test's environment, on one thread, with the running Python first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    entries = [str(ROOT), *map(str, pythonpath)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "PATH": path, "PYTHONPATH": os.pathsep.join(entries)}


def other_python() -> str | None:
    """The Python of another stack, which ``.ci/run`` names; None where there is none."""
    return os.environ.get("UMED_OTHER_PYTHON")


def python_of_llavas_pins() -> str | None:
    """A Python in which LLaVA runs as it is, without the plugin: this one, else the other stack's."""
    return sys.executable if version("transformers").startswith("4.") else other_python()


def train(checkpoint: Path, records: Path, output: Path, *more: str, **keywords: object) -> subprocess.CompletedProcess:
    """Stage 1 by ``umed-run python -m llava.train.train_mem``."""
    flags = train_flags(checkpoint, records, output, "--umed_stage", "instruction_tuning", *more)
    return umed_run(["python", "-m", "llava.train.train_mem", *flags], **keywords)
