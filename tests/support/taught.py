"""Checkpoints that know something: three answers by heart, or a LoRA adapter of random values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from umed_plugin.checkpoints.loading import load_checkpoint

ANSWERS = (
    "One area is abnormal, at [0.12, 0.34, 0.56, 0.78]. It is a nodule.",
    "I see a cyst at [0.50, 0.25, 0.75, 0.40] in this image.",
    "The image shows no abnormality.",
)


QUESTION = "What abnormality can be seen in this image?"


STOCK = Path(__file__).resolve().parents[2] / "benchmarks" / "stock_vqa.py"


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
                "answer_type": "grounded",
                "provenance": {"image_aspect_ratio": "pad"},
            }
        )
    return made


def learn_by_heart(checkpoint: Path, records: list[dict], folder: Path, out: Path) -> None:
    """Train the model on the three answers until it gives them: a random one would never end its answer."""
    from llava.mm_utils import process_images, tokenizer_image_token

    from umed_plugin.checkpoints.prompt_templates import question_prompt

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


def write_lora(base: Path, folder: Path) -> Path:
    """A LoRA folder over ``base`` as LLaVA's training writes it, with random values instead of trained ones."""
    from llava.train.train import find_all_linear_names
    from peft import LoraConfig, get_peft_model

    tokenizer, model, _ = load_checkpoint(base, device="cpu")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=find_all_linear_names(model), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for parameter in model.get_base_model().get_model().mm_projector.parameters():
        parameter.requires_grad = True
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # LLaVA names linear layers by their last part, so the adapter may sit on the tower too, where it stays zero.
            if "vision_tower" not in name and ("lora_" in name or "mm_projector" in name):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.config.save_pretrained(folder)
    # The lines at the end of LLaVA's train(), whose helpers for ZeRO-3 need deepspeed.
    state = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    model.save_pretrained(folder, state_dict={name: tensor for name, tensor in state.items() if "lora_" in name})
    torch.save({n: t for n, t in state.items() if "lora_" not in n}, folder / "non_lora_trainables.bin")
    return folder
