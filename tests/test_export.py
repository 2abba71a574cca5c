"""An exported checkpoint in stock LLaVA, in a process where the plugin cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from umed_plugin.checkpoint import export, load_checkpoint
from umed_plugin.evaluate import evaluate

ANSWERS = (
    "One area is abnormal, at [0.12, 0.34, 0.56, 0.78]. It is a nodule.",
    "I see a cyst at [0.50, 0.25, 0.75, 0.40] in this image.",
    "The image shows no abnormality.",
)
QUESTION = "What abnormality can be seen in this image?"

STOCK = Path(__file__).resolve().parent.parent / "benchmarks" / "stock_vqa.py"


def study_records(folder: Path) -> list[dict]:
    """Three wide pictures that the model can tell apart, with an answer each."""
    folder.mkdir()
    made = []
    for index, answer in enumerate(ANSWERS):
        pixels = np.zeros((48, 80), np.uint8)
        pixels[:, index * 25 : index * 25 + 25] = 200
        Image.fromarray(pixels).save(folder / f"{index}.png")
        made.append(
            {
                "id": f"study {index}",
                "image": f"{index}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{QUESTION}"},
                    {"from": "gpt", "value": answer},
                ],
                "objects": {"ref": [], "bbox": [], "bbox_type": "real"},
                "image_size": [80, 48],
                "terms": {"nodule": ["nodule"]},
                "provenance": {"image_aspect_ratio": "pad"},
            }
        )
    return made


def learn_by_heart(checkpoint: Path, records: list[dict], folder: Path, out: Path) -> None:
    """Train the model on the three answers until it gives them: a random one would never end its answer."""
    from llava.mm_utils import process_images, tokenizer_image_token

    from umed_plugin.conversation import question_prompt

    tokenizer, model, processor = load_checkpoint(checkpoint, device="cpu")
    prompt = tokenizer_image_token(question_prompt(QUESTION, "mistral_instruct"), tokenizer)
    answers = [tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for answer in ANSWERS]
    length = max(map(len, answers))
    ids = torch.tensor([prompt + answer + [0] * (length - len(answer)) for answer in answers])
    labels = torch.tensor([[-100] * len(prompt) + answer + [-100] * (length - len(answer)) for answer in answers])
    mask = torch.tensor([[1] * (len(prompt) + len(answer)) + [0] * (length - len(answer)) for answer in answers])
    images = process_images([Image.open(folder / r["image"]).convert("RGB") for r in records], processor, model.config)
    torch.manual_seed(0)
    trained = [parameter for name, parameter in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, images=images).loss
        loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@pytest.fixture(scope="module")
def exported(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict]]:
    """(exported checkpoint, folder of the images, records)."""
    folder = tmp_path_factory.mktemp("export")
    records = study_records(folder / "images")
    learn_by_heart(tiny_mistral, records, folder / "images", folder / "trained")
    out = export(folder / "trained", folder / "llava-mistral-umed", like=tiny_mistral, with_tower=True)
    return out, folder / "images", records


def test_stock_llava_gives_the_answers_that_the_plugin_gives(exported, tmp_path):
    checkpoint, images, records = exported
    ours = evaluate(checkpoint, records, image_folder=images, template="mistral_instruct", max_new_tokens=200)
    lines = [{"question_id": r["id"], "image": r["image"], "text": QUESTION} for r in records]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = {
        "model_path": str(checkpoint),
        "image_folder": str(images),
        "question_file": str(tmp_path / "questions.jsonl"),
        "answers_file": str(tmp_path / "answers.jsonl"),
    }
    # -I leaves out PYTHONPATH and the working folder, from which the plugin could come.
    done = subprocess.run(
        [sys.executable, "-I", str(STOCK), json.dumps(arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stock = [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert stock == [case.answer for case in ours.cases]
    assert stock == list(ANSWERS), "the model has learnt its three answers, so the comparison says something"
