"""What stage 1's options keep and what they cost: captions that the base could write, and boxes.

The demo's base checkpoint was trained on captions without boxes. Stage 1 then trains on boxes alone. For each row, on held-out
studies of each seed:

- captions: the cross-entropy of their captions, in nats per token, and how much less it rose than without any option, with a 95 %
  interval over patients;
- mean IoU of the boxes, and its difference from stage 1 without any option;
- teacher: mean cosine between the tower's patch features and those of a small SAM encoder, behind the best linear map. The map is
  fitted on one half of the studies and measured on the other.

    python benchmarks/keeping.py runs/keeping --seeds 3,4

The teacher is a random SAM encoder of known weights: it shows that the loss acts, and nothing about a medical one. Finished
steps are not done again. Writes ``table.md`` and ``results.json`` to the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ablation import SeedRun, read_cases, values_of
from intervals import differences, mean_difference

from umed_plugin.commands.demo.pipeline import DemoSettings
from umed_plugin.data.records import load_records
from umed_plugin.evaluation.metrics.metric import Row as ScoredStudy
from umed_plugin.evaluation.tables import formatted

PLAIN = "plain"
# Name of a row -> stage 1's flags; {teacher} is the SAM encoder's file.
ROWS = {
    PLAIN: (),
    "keep 0.1": ("--umed_keep", 0.1),
    "keep clinkd": ("--umed_keep", "clinkd"),
    "replay 0.2": ("--umed_replay", 0.2),
    "tower": ("--umed_tower_lr", 3e-5),
    "tower and teacher": ("--umed_tower_lr", 3e-5, "--umed_tower_teacher", "{teacher}"),
}
_BATCH = 50


def write_teacher(file: Path, seed: int = 0) -> Path:
    """A random SAM encoder for 64 px squares: 8 px patches, 2 blocks of width 32, the second one global, 16 channels."""
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    sizes = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "output_channels": 16}
    torch.manual_seed(seed)
    encoder = SamVisionEncoder(
        SamVisionConfig(**sizes, image_size=64, patch_size=8, window_size=3, global_attn_indexes=[1])
    )
    for name, parameter in encoder.named_parameters():
        # No biases and plain norms, so that the features differ from place to place.
        if "layer_norm" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        elif name.endswith("bias") or name == "pos_embed":
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    # As LVM-Med names them.
    torch.save({f"model.{name}": tensor for name, tensor in encoder.state_dict().items()}, file)
    return file


def caption_losses(checkpoint: Path, records: Sequence[Any], images: Path, seed: int) -> list[ScoredStudy]:
    """Cross-entropy of each held-out study's caption, in nats per token, asked as the base was trained."""
    from llava.constants import IGNORE_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.checkpoints.prompt_templates import question_prompt
    from umed_plugin.commands.demo.prior import caption_records
    from umed_plugin.model.distillation import answer_states, head_of, record_losses

    tokenizer, model, processor = load_checkpoint(checkpoint, device="cpu")
    found = []
    for start in range(0, len(records), _BATCH):
        part = records[start : start + _BATCH]
        ids, labels = [], []
        for record in caption_records(part, seed):
            question, answer = (turn["value"] for turn in record["conversations"])
            prompt = tokenizer_image_token(question_prompt(question, "mistral_instruct"), tokenizer)
            told = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids.append(torch.tensor([*prompt, *told]))
            labels.append(torch.tensor([IGNORE_INDEX] * len(prompt) + told))
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = {
            "input_ids": pad(ids, batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad([torch.ones(len(row)) for row in ids], batch_first=True).bool(),
            "images": process_images(
                [Image.open(images / r["image"]).convert("RGB") for r in part], processor, model.config
            ),
        }
        with answer_states(model, without_logits=True) as states, torch.no_grad():
            model(**inputs)
        losses = record_losses(states[0], head_of(model), len(part)).tolist()
        found += [
            ScoredStudy(record["id"], record["patient"], {"captions": loss}) for record, loss in zip(part, losses)
        ]
    return found


def teacher_cosines(checkpoint: Path, teacher: Path, records: Sequence[Any], images: Path) -> list[ScoredStudy]:
    """Mean cosine of each study of the second half, behind the linear map that fits the first half best."""
    from llava.mm_utils import process_images
    from PIL import Image

    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.checkpoints.sam_encoder import load_sam_encoder, read_sam_file
    from umed_plugin.model.tower_teacher import TowerTeacher

    _, model, processor = load_checkpoint(checkpoint, device="cpu")
    tower = model.get_vision_tower()
    teaching = TowerTeacher(load_sam_encoder(read_sam_file(teacher)), processor.image_mean, processor.image_std)
    own, theirs = [], []
    for record in records:
        pixels = process_images([Image.open(images / record["image"]).convert("RGB")], processor, model.config)
        with torch.no_grad():
            own.append(tower(pixels)[0])
        theirs.append(teaching.features(pixels, tower.num_patches_per_side)[0])
    half = len(records) // 2
    inputs = [torch.cat([features, torch.ones(len(features), 1)], dim=1) for features in own]
    onto = torch.linalg.lstsq(torch.cat(inputs[:half]).double(), torch.cat(theirs[:half]).double()).solution.float()
    found = []
    for record, features, targets in zip(records[half:], inputs[half:], theirs[half:]):
        cosine = torch.nn.functional.cosine_similarity(features @ onto, targets, dim=-1).mean().item()
        found.append(ScoredStudy(record["id"], record["patient"], {"teacher": cosine}))
    return found


def train_and_answer(run: SeedRun, names: Sequence[str], teacher: Path) -> None:
    """Train each row from the base, and ask all of them about the held-out studies; each is done once."""
    run.once("base", lambda: (run.demo.records(), run.demo.base_checkpoint()))
    records = load_records(run.demo.data / "records.json")
    for name in ("base", *names):
        if name != "base":
            flags = [str(word).format(teacher=teacher) for word in ROWS[name]]
            run.once(name, partial(run.demo.instruction_tuning, folder(name), None, flags))
        asked = partial(run.demo.evaluate, folder(name), run.demo.checkpoint(folder(name)), records)
        run.once(f"evaluation-{name}", asked)


def measured(run: SeedRun, name: str, teacher: Path) -> list[ScoredStudy]:
    """Captions, boxes and cosine of each held-out study of a row; kept in the folder."""
    file = run.folder / "measured" / f"{name}.json"
    if not file.is_file():
        records = [record for record in load_records(run.demo.data / "records.json") if record["split"] == "test"]
        checkpoint, images = run.demo.checkpoint(name), run.demo.data
        values: dict[str, dict[str, float]] = {record["id"]: {} for record in records}
        rows = caption_losses(checkpoint, records, images, run.seed)
        rows += teacher_cosines(checkpoint, teacher, records, images)
        for row in [*rows, *read_cases(run.folder, name)]:
            values[row.id].update({key: row.values[key] for key in row.values if key in _SHOWN})
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([[r["id"], r["patient"], values[r["id"]]] for r in records]), encoding="utf-8")
    return [ScoredStudy(*row) for row in json.loads(file.read_text(encoding="utf-8"))]


_SHOWN = {"captions": "+.3f", "mean_iou": "+.3f", "teacher": "+.3f"}


def line(name: str, by_seed: Sequence[tuple[list[ScoredStudy], list[ScoredStudy]]]) -> dict[str, Any]:
    """A row's figures over all seeds, and their paired differences from stage 1 without any option."""
    entry: dict[str, Any] = {"name": name}
    for key in _SHOWN:
        entry[key] = fmean(value for _, rows in by_seed for value in values_of(rows, key))
        pairs = [differences(key, plain, rows, seed) for seed, (plain, rows) in enumerate(by_seed)]
        entry[f"{key}_difference"], entry[f"{key}_ci95"] = mean_difference([row for rows in pairs for row in rows])
    return entry


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    """The table; in brackets the paired difference from stage 1 without any option, with its 95 % interval."""
    lines = ["| stage 1 | captions, nats per token | mean IoU | cosine to the teacher |", "|---|---|---|---|"]
    for entry in entries:
        cells = [f"{entry[key]:.3f}" for key in _SHOWN]
        if entry["name"] not in ("base", PLAIN):
            told = (formatted(entry[f"{key}_difference"], entry[f"{key}_ci95"], form) for key, form in _SHOWN.items())
            cells = [f"{cell} ({difference})" for cell, difference in zip(cells, told)]
        lines.append(f"| {entry['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    from umed_plugin.patches import prepare_llava

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="3,4")
    parser.add_argument("--studies", type=int, default=2000, help="studies that stage 1 trains on")
    parser.add_argument("--test", type=int, default=400, help="held-out studies")
    parser.add_argument("--rows", default=",".join(ROWS), help="of: " + ", ".join(ROWS))
    parser.add_argument("--processes", type=int, default=2, help="processes of one training run")
    parser.add_argument("--epochs", type=float, default=DemoSettings.tuning_epochs)
    options = parser.parse_args(arguments)
    prepare_llava()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    teacher = write_teacher(out / "teacher.pth")
    settings = DemoSettings(
        tuning=options.studies,
        rewarding=0,
        test=options.test,
        processes=options.processes,
        tuning_epochs=options.epochs,
    )
    names = [PLAIN, *(name for name in options.rows.split(",") if name != PLAIN)]
    runs = [SeedRun(out / f"seed{seed}", int(seed), settings) for seed in options.seeds.split(",")]
    for run in runs:
        train_and_answer(run, names, teacher)
    found = {name: [measured(run, folder(name), teacher) for run in runs] for name in ("base", *names)}
    entries = [line(name, list(zip(found[PLAIN], found[name]))) for name in ("base", *names)]
    (out / "results.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(entries) + "\n", encoding="utf-8")
    print(markdown(entries))


def folder(row_name: str) -> str:
    """A row's name as a folder's."""
    return row_name.replace(" ", "-").replace(".", "_")


if __name__ == "__main__":
    main()
