"""Time of a stage 2 step with and without the feature cache (``--umed_feature_cache``).

LLaVA's own ``train()`` under the plugin's patches runs a first epoch, which fills the cache. Then every batch of the second
epoch is computed both ways in turn, from the image file to the gradient. Weights and random numbers are the same, and the
losses must be equal. Images are CT slices in DICOM, about 512 pixels wide, which the recipe renders to PNG when it builds the
records: training opens no DICOM. The data loader has no workers, so reading counts in full, and all files are in the page
cache.

Tower and language model have random weights and the sizes of ViT-B/14 at 336 pixels and 8 layers of width 512. The cache saves
the tower's and the reader's share of a step. Beside a language model of 7 billion parameters the tower's share is far smaller.

    python benchmarks/feature_cache.py [--help]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Clock = Callable[[], float]
SCALE = 4  # generated slices are about 128 pixels wide, those of a scanner 512
PARTS = ("data", "tower", "rest")


def arguments() -> argparse.Namespace:
    """The sizes, from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=8, help="CT slices in the training set")
    parser.add_argument("--batch", type=int, default=2, help="queries per step")
    parser.add_argument("--candidates", type=int, default=8, help="answers per query (K)")
    parser.add_argument("--new-tokens", type=int, default=100, help="maximum tokens per answer")
    parser.add_argument("--cpu-seconds", action="store_true", help="measure CPU seconds, for a machine with other load")
    parser.add_argument("--tower", type=int, nargs=3, default=(768, 12, 336), metavar=("WIDTH", "LAYERS", "PIXELS"))
    parser.add_argument("--model", type=int, nargs=2, default=(512, 8), metavar=("WIDTH", "LAYERS"))
    return parser.parse_args()


def make_data(folder: Path, count: int) -> None:
    """``count`` CT slices as DICOM, enlarged to a scanner's size, and their ``annotations.csv``."""
    import numpy as np
    import pydicom

    from umed_plugin.commands.demo.studies import COLUMNS, make_studies

    # Every second study is a CT.
    with open(make_studies(folder, train=2 * count, val=0, test=0), newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["modality"] == "CT"]
    for name in {row["file"] for row in rows}:
        slice_ = pydicom.dcmread(folder / name)
        pixels = np.kron(slice_.pixel_array, np.ones((SCALE, SCALE), np.uint16))
        slice_.Rows, slice_.Columns = pixels.shape
        slice_.PixelData = pixels.astype("<u2").tobytes()
        slice_.save_as(folder / name, enforce_file_format=True)
    for row in rows:
        row.update({corner: SCALE * int(row[corner]) for corner in ("x1", "y1", "x2", "y2") if row[corner]})
    with open(folder / "annotations.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def make_model(folder: Path, tower: tuple[int, int, int], model: tuple[int, int]) -> Path:
    """A checkpoint with random weights and a tower of these sizes, from LLaVA's own classes."""
    import torch
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor, CLIPVisionModel
    from transformers import CLIPVisionConfig

    from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

    torch.manual_seed(0)
    width, layers, pixels = tower
    checkpoint = make_checkpoint(folder, hidden_size=model[0], layers=model[1])
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision = CLIPVisionConfig(**sizes, num_attention_heads=width // 64, image_size=pixels, patch_size=14)
    CLIPVisionModel(vision).save_pretrained(checkpoint / "vision_tower")
    square = {"height": pixels, "width": pixels}
    CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size=square).save_pretrained(checkpoint / "vision_tower")
    config = LlavaMistralConfig.from_pretrained(checkpoint)
    config.update({"mm_hidden_size": width, "max_position_embeddings": 2048})
    LlavaMistralForCausalLM(config).save_pretrained(checkpoint)
    return checkpoint


def train_and_measure(flags: list[str], clock: Clock) -> list[dict[str, dict[str, float]]]:
    """Run LLaVA's ``train()`` for an epoch, then `measure`: for each step seconds by side and part."""
    from llava.train import train as llava_train

    from umed_plugin.training.trainer import RewardingTrainer

    steps: list[dict[str, dict[str, float]]] = []
    stock = RewardingTrainer.train

    def train(self: Any, *positional: Any, **keywords: Any) -> None:
        stock(self, *positional, **keywords)
        steps.extend(measure(self, clock))

    RewardingTrainer.train = train
    sys.argv = ["train_mem.py", *flags]
    llava_train.train()
    return steps


def measure(trainer: Any, clock: Clock) -> list[dict[str, dict[str, float]]]:
    """Compute each batch of an epoch both ways: seconds of data, tower and the rest of the step."""
    order = list(trainer._get_train_sampler())
    size = trainer.args.per_device_train_batch_size
    batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    cache, steps = trainer.train_dataset.feature_cache, []
    one_step(trainer, batches[0], cache, clock)  # warms up
    for index, batch in enumerate(batches):
        sides = [("without", None), ("with", cache)]
        taken = {name: one_step(trainer, batch, side, clock) for name, side in sides[:: 1 if index % 2 else -1]}
        losses = [side.pop("loss") for side in taken.values()]
        if losses[0] != losses[1] or losses[0] == 0:
            raise SystemExit(
                f"step {index}: {losses[0]} and {losses[1]} with and without the cache; they must be equal, and not 0"
            )
        steps.append(taken)
    return steps


def one_step(trainer: Any, indices: list[int], cache: Any, clock: Clock) -> dict[str, float]:
    """Seconds of one step from the files to the optimizer, by part, and its loss. The weights do not change."""
    import torch

    seconds = {}
    sampling, reader = trainer.maker.sampling, trainer.rollouts.reader
    read = reader.read

    def timed(part: str, stock: Any) -> Any:
        def call(*positional: Any) -> Any:
            began = clock()
            result = stock(*positional)
            seconds[part] = clock() - began
            return result

        return call

    torch.manual_seed(0)
    trainer.train_dataset.feature_cache = cache
    sampling.encode, reader.read = timed("tower", sampling.encode), timed("data", read)
    began = clock()
    loss = trainer.training_step(trainer.model, {"indices": torch.tensor(indices)})
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.optimizer.step()
    trainer.model.zero_grad()
    seconds["rest"] = clock() - began - seconds["data"] - seconds["tower"]
    del sampling.encode  # the method is there again
    reader.read = read
    return {**seconds, "loss": loss.item()}


def report(steps: list[dict[str, dict[str, float]]]) -> None:
    """Print the median seconds of each part on both sides and the share saved."""
    sides = ("without", "with")
    parts = {part: {side: statistics.median(step[side][part] for step in steps) for side in sides} for part in PARTS}
    for name, summed in (("data + tower", ("data", "tower")), ("step", PARTS)):
        parts[name] = {
            side: statistics.median(sum(step[side][part] for part in summed) for step in steps) for side in sides
        }
    print(f"median of {len(steps)} steps of the second epoch; losses with and without the cache are equal")
    print(f"{'seconds a step':16}{'without':>10}{'with':>10}{'saved':>10}")
    for name, seconds in parts.items():
        saved = 1 - seconds["with"] / seconds["without"]
        print(f"{name:16}{seconds['without']:10.4f}{seconds['with']:10.4f}{saved:10.1%}")


def main() -> None:
    """Print the table."""
    from umed_plugin.patches import TRIGGERS, after_import
    from umed_plugin.patching.import_hook import install

    sizes = arguments()
    install(TRIGGERS, after_import)
    with tempfile.TemporaryDirectory(prefix="umed-") as temporary:
        work = Path(temporary)
        make_data(work / "studies", sizes.images)
        checkpoint = make_model(work / "bench-llava-mistral", sizes.tower, sizes.model)
        flags = f"""
            --model_name_or_path {checkpoint} --vision_tower {checkpoint}/vision_tower --version umed_mistral
            --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --mm_use_im_patch_token False
            --image_aspect_ratio pad --model_max_length 2048 --output_dir {work}/out --umed_stage rewarding
            --umed_recipe demo_studies --umed_data_root {work}/studies --umed_feature_cache {work}/cache
            --umed_entropy_coef 0.01
            --umed_num_candidates {sizes.candidates} --umed_max_new_tokens {sizes.new_tokens}
            --per_device_train_batch_size {sizes.batch} --num_train_epochs 1 --learning_rate 1e-5 --use_cpu True
            --dataloader_num_workers 0 --report_to none --logging_steps 1 --save_strategy no --disable_tqdm True
        """
        report(train_and_measure(flags.split(), time.process_time if sizes.cpu_seconds else time.perf_counter))


if __name__ == "__main__":
    main()
