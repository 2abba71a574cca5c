"""What one stack computes from given checkpoints and records, for `test_stacks.py`, which runs this under two of them.

    python stack_facts.py compute CHECKPOINTS RECORDS OUT    tokens, logits and answers; a stage-1 run, its export and its logits
    python stack_facts.py load EXPORTED OUT                  logits of an exported checkpoint alone

Writes OUT/facts.pt, plain tensors and lists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from umed_plugin.patches import prepare_llava

prepare_llava()

from support.tuning import make_dataset  # noqa: E402
from support.umed_runs import train  # noqa: E402
from umed_plugin.checkpoints.exporting import export  # noqa: E402
from umed_plugin.checkpoints.loading import load_checkpoint  # noqa: E402
from umed_plugin.model.forward import decode_answers, embed_prompts, encode_images  # noqa: E402
from umed_plugin.model.sampling import SamplingSettings, generate  # noqa: E402
from umed_plugin.training.tuning_data import tokenize_record  # noqa: E402

TEMPLATES = {"mistral": ("umed_mistral", "mistral_instruct"), "llama": ("umed_v1", "llava_v1")}
# What LLaVA's scripts say, in their words; the loss is logged to four decimals under transformers 4.
TRAINING = (
    "--max_steps 12 --gradient_accumulation_steps 2 --warmup_ratio 0.1 --lr_scheduler_type cosine --weight_decay 0.1 "
    "--evaluation_strategy no --save_strategy no --seed 3"
)


def prompt_and_image(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokenizer("[INST] Where is it? [/INST] At").input_ids
    return torch.tensor([*ids[:1], -200, *ids[1:]]), torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)


@torch.no_grad()
def outputs(checkpoint: Path) -> dict[str, Any]:
    """Logits [1, L, V] of one prompt, and the greedy answer to it by our sampling and by LLaVA's own ``generate``."""
    tokenizer, model, _ = load_checkpoint(checkpoint, device="cpu")
    ids, image = prompt_and_image(tokenizer)
    prompts = embed_prompts(model, [ids], encode_images(model, image))
    ours = generate(
        model, prompts, SamplingSettings(max_new_tokens=16, temperature=0.0, eos_token_id=tokenizer.eos_token_id)
    )
    stock = model.generate(ids[None], images=image, do_sample=False, max_new_tokens=16, use_cache=True)
    stock_text = tokenizer.batch_decode(stock, skip_special_tokens=True)[0].strip()
    return {
        "logits": model(input_ids=ids[None], images=image).logits,
        "answer": decode_answers(tokenizer, ours)[0],
        "stock answer": stock_text,
    }


def supervised(checkpoint: Path, records: Path, family: str) -> list[list[int]]:
    """Token ids and labels of every record under both templates of the family, by LLaVA's own preprocessing."""
    tokenizer, _, _ = load_checkpoint(checkpoint, device="cpu")
    tokenizer.pad_token = tokenizer.unk_token
    found = []
    for template in TEMPLATES[family]:
        dataset = make_dataset(records, tokenizer, template)
        for index in range(len(dataset)):
            found += [part.tolist() for part in tokenize_record(dataset, index, template)]
    return found


def trained(checkpoint: Path, records: Path, out: Path) -> dict[str, Any]:
    """The loss of each step of a stage-1 run, and what its export computes."""
    run = train(checkpoint, records, out / "trained-llava-mistral", *TRAINING.split())
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    state = json.loads((out / "trained-llava-mistral" / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    exported = export(out / "trained-llava-mistral", out / "llava-mistral-exported", like=checkpoint, with_tower=True)
    return {"losses": losses, "exported": outputs(exported)}


def main(args: SimpleNamespace) -> None:
    facts: dict[str, Any] = {}
    if args.task == "load":
        facts = outputs(args.paths[0])
    else:
        checkpoints, records = args.paths[:2]
        for family in TEMPLATES:
            checkpoint = checkpoints / f"tiny-llava-{family}"
            facts[family] = {**outputs(checkpoint), "supervised": supervised(checkpoint, records, family)}
        facts["trained"] = trained(checkpoints / "tiny-llava-mistral", records, args.paths[-1])
    torch.save(facts, args.paths[-1] / "facts.pt")


if __name__ == "__main__":
    main(SimpleNamespace(task=sys.argv[1], paths=[Path(path) for path in sys.argv[2:]]))
