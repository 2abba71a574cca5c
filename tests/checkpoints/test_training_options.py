"""What each training option of stage 1 leaves: a checkpoint that stock LLaVA loads and that answers the same there."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.records import write_records
from support.sam_files import write_sam_file
from support.umed_runs import python_of_llavas_pins, train, weights

from umed_plugin.checkpoints.exporting import export
from umed_plugin.checkpoints.folder import TOWER
from umed_plugin.checkpoints.merging import merge

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "stock_loads.py"
LORA = "--lora_enable True --lora_r 4 --lora_dropout 0"
TRAININGS = {
    "keep": f"{LORA} --umed_keep 0.1",
    "teacher": f"{LORA} --umed_keep clinkd --umed_teacher {{base}}",
    "replay": "--umed_replay 0.5 --num_train_epochs 2",
    "tower-full": "--umed_tower_lr 5e-3",
    "tower-teacher": f"{LORA} --umed_tower_lr 5e-3 --umed_tower_teacher {{sam}}",
}


@pytest.fixture(scope="module")
def exports(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name of a training -> (its folder, its export in float32)."""
    folder = tmp_path_factory.mktemp("options")
    records = write_records(folder / "data", count=4)
    sam = write_sam_file(folder / "lvmmed_vit.pth", "model.")
    made = {}
    for name, flags in TRAININGS.items():
        trained, out = folder / f"trained-{name}", folder / name / "llava-mistral-umed"
        out.parent.mkdir()
        words = shlex.split(flags.format(base=tiny_mistral, sam=sam))
        run = train(tiny_mistral, records, trained, "--max_steps", "2", "--learning_rate", "5e-3", *words)
        assert run.returncode == 0, (name, run.stderr[-3000:])
        if "lora" in flags:
            merge(trained, tiny_mistral, out, dtype="float32")
        else:
            export(trained, out, like=tiny_mistral, dtype="float32")
        made[name] = trained, out
    return made


def test_the_exports_have_the_originals_tensors_and_a_trained_tower_besides(exports, tiny_mistral):
    original = load_file(tiny_mistral / "model.safetensors")
    tower = load_file(tiny_mistral / "vision_tower" / "model.safetensors")
    whole = {f"{TOWER}vision_tower.{name}" for name in tower}
    for name, (trained, out) in exports.items():
        found, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
        if not name.startswith("tower"):
            assert set(found) == set(original) and "unfreeze_mm_vision_tower" not in config
            continue
        assert set(found) == set(original) | whole and config["unfreeze_mm_vision_tower"] is True
        learnt = {n.removeprefix("base_model.model."): t for n, t in weights(trained).items() if "vision_tower" in n}
        for key, tensor in learnt.items():
            assert key.endswith("position_ids") or torch.equal(found[key], tensor.float()), key
        changed = [
            n for n in whole if not torch.equal(found[n], tower[n.removeprefix(f"{TOWER}vision_tower.")].float())
        ]
        assert changed and not any("post_layernorm" in n or "layers.1." in n for n in changed)


def test_stock_llava_answers_the_same_without_the_plugin(exports, tmp_path):
    """The process cannot import the plugin. Here the training's own folder is loaded, with the adapter unmerged."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    from umed_plugin.checkpoints.loading import load_checkpoint

    python = python_of_llavas_pins()
    if python is None:
        pytest.skip("LLaVA runs as it is on its pins alone: UMED_OTHER_PYTHON names a Python that has them")
    pairs = [[str(out), None] for _, out in exports.values()]
    done = subprocess.run(
        [python, "-I", str(SCRIPT), json.dumps(pairs)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [(x * 5 + y) % 256 for y in range(48) for x in range(80)]
    image = Image.new("L", (80, 48))
    image.putdata(rows)
    for (name, (trained, _)), stock in zip(exports.items(), told):
        assert "error" not in stock, (name, stock)
        tokenizer, model, processor = load_checkpoint(trained, device="cpu", dtype=torch.float32)
        pixels = process_images([image.convert("RGB")], processor, model.config).float()
        ids = tokenizer_image_token("[INST] <image>\nWhere is it? [/INST]", tokenizer, return_tensors="pt")[None]
        with torch.inference_mode():
            logits = model(input_ids=ids, images=pixels).logits[0, -1]
            tokens = model.generate(inputs=ids, images=pixels, do_sample=False, max_new_tokens=8)[0].tolist()
        # fp16 of stock LLaVA's loading is all that differs.
        assert stock["logits"] == pytest.approx(logits[:16].tolist(), abs=0.02), name
        assert stock["tokens"][-len(tokens) :] == tokens[-len(stock["tokens"]) :], name
    assert len({json.dumps(stock["logits"]) for stock in told}) == len(told), "each option trained something else"
