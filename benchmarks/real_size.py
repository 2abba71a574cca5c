"""Every command at a real checkpoint's size, with seconds and peak memory, on a machine without a GPU.

    python benchmarks/real_size.py /big/disk/real-size --tokenizer mistral/tokenizer.model

Needs today's libraries (``make test STACK=current`` makes them), 60 GB of disk and 24 GB of memory, and takes about an hour on
two cores. It writes a checkpoint of LLaVA-Med 1.5's shapes with random weights: Mistral 7B, CLIP ViT-L/14-336, four bfloat16
shards. Each row then is a command as a user would give it, in a process of its own.

Peak memory is that of the process's own pages. Pages of a mapped weight file are counted apart: the system drops them when memory
is short. Finished rows are kept in ``rows.json``, so an interrupted benchmark goes on with the same command. ``--only`` runs some
rows, ``--small`` a checkpoint of a few million parameters, as the test does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import stack

from umed_plugin import files


@dataclass(frozen=True)
class Shape:
    """Sizes of language model and tower; the defaults are LLaVA-Med 1.5's."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    ffn: int = 14336
    vocabulary: int = 32000
    tower_hidden: int = 1024
    tower_layers: int = 24
    image: int = 336
    patch: int = 14
    lora_rank: int = 128


SMALL = Shape(128, 2, 4, 2, 256, 32000, 64, 2, 56, 14, 8)


def main() -> None:
    """Run the rows that are not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the sentencepiece model of Mistral 7B")
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--small", action="store_true", help="a few million parameters")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    shape = replace(SMALL if args.small else Shape(), vocabulary=pieces(args.tokenizer))
    run = RealSize(args.folder.resolve(), args.tokenizer.resolve(), shape, args.threads)
    rows = dict(run.rows())
    wanted = list(rows) if args.only is None else args.only.split(",")
    for name in wanted:
        if name not in rows:
            parser.error(f"--only: there is no row {name!r}. Allowed: {', '.join(rows)}")
        run.keep(name, rows[name])
    print(run.table())


class RealSize:
    """The benchmark in a folder.

    Args:
        folder: for checkpoint, studies and results.
        tokenizer: sentencepiece model.
        shape: of the checkpoint.
        threads: of each process.
    """

    def __init__(self, folder: Path, tokenizer: Path, shape: Shape, threads: int) -> None:
        self.folder, self.tokenizer, self.shape = folder, tokenizer, shape
        self.checkpoint, self.records = folder / "llava-mistral-7b", folder / "data" / "records.json"
        self.env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        root = str(Path(__file__).resolve().parents[1])
        self.env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "rows.json"
        self._done: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def rows(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """(name, what runs it) of all rows, in an order in which each finds what it needs."""
        checkpoint, out = self.checkpoint, self.folder / "out"
        two = ("--limit", 2, "--max-new-tokens", 16, "--batch-size", 2, "--device", "cpu")
        yield "make the checkpoint", self._own(make_checkpoint, checkpoint, self.tokenizer, self.shape)
        yield "studies and records", self._own(make_records, self.records)
        yield "umed doctor", self._umed("doctor", checkpoint)
        yield "make an adapter", self._own(make_adapter, checkpoint, self.folder / "adapter-lora", self.shape)
        yield (
            "umed merge",
            self._umed(
                *("merge", self.folder / "adapter-lora", "--base", checkpoint, "--out", out / "llava-mistral-merged")
            ),
        )
        yield "umed convert", self._umed("convert", checkpoint, "--out", out / "hf")
        yield "umed convert back", self._umed("convert", out / "hf", "--out", out / "llava-mistral-back")
        yield "umed evaluate (2 questions)", self._umed("evaluate", checkpoint, "--benchmark", self.records, *two)
        yield "umed serve (until it answers)", self._serve
        yield "stage 1 (1 step)", self._stage("instruction_tuning", checkpoint, out / "stage1")
        yield "stage 2 (1 step)", self._stage("rewarding", checkpoint, out / "stage2", *REWARDING)

    def keep(self, name: str, row: Callable[[], dict[str, Any]]) -> None:
        """Run a row unless it is done; keep and print what it measured."""
        if name in self._done:
            return
        print(f"{name} ...", flush=True)
        self._done[name] = row()
        files.write_json(self._file, self._done)
        print(f"    {self._done[name]}", flush=True)

    def table(self) -> str:
        """What has been measured, as a Markdown table."""
        lines = ["| | seconds | peak memory, GB | of which mapped files, GB at most |", "|---|---|---|---|"]
        for name, row in self._done.items():
            mapped = max(0.0, row["resident_gb"] - row["own_gb"])
            lines.append(f"| {name} | {row['seconds']:.0f} | {row['own_gb']:.1f} | {mapped:.1f} |")
        return "\n".join([*lines, "", stack()])

    def _own(self, function: Callable[..., None], *arguments: Any) -> Callable[[], dict[str, Any]]:
        """A function of this file in a process of its own."""
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import real_size as r; from pathlib import *\n"
        code += f"from real_size import *; r.{function.__name__}(*{arguments!r})"
        return lambda: measured([sys.executable, "-c", code], self.env)

    def _umed(self, *words: Any) -> Callable[[], dict[str, Any]]:
        command = [sys.executable, "-m", "umed_plugin.cli", *map(str, words)]
        if "--out" in command and "evaluate" not in command:
            command.append("--overwrite")  # what an interrupted benchmark may have left
        return lambda: measured(command, self.env)

    def _stage(self, stage: str, start: Path, out: Path, *more: Any) -> Callable[[], dict[str, Any]]:
        flags = ("--model_name_or_path", start, "--vision_tower", start / "vision_tower", "--data_path", self.records)
        flags += ("--image_folder", self.records.parent, "--output_dir", out, "--umed_stage", stage)
        flags += ("--lora_r", self.shape.lora_rank // 4, "--lora_alpha", self.shape.lora_rank // 2)
        words = [sys.executable, "-m", "umed_plugin.launch", sys.executable, "-m", "llava.train.train_mem"]
        return lambda: measured([*words, *map(str, (*flags, *TRAINING, *more))], self.env)

    def _serve(self) -> dict[str, Any]:
        words = [sys.executable, "-m", "umed_plugin.cli", "serve", str(self.checkpoint), "--port", "0"]
        return measured(words, self.env, until=_page_is_there)


# As `umed upgrade` starts it on a GPU; on a CPU with one record a step.
TRAINING = (
    *("--version", "umed_mistral", "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2),
    *("--mm_use_im_start_end", False, "--mm_use_im_patch_token", False, "--image_aspect_ratio", "pad"),
    *("--lora_enable", True, "--bf16", True, "--gradient_checkpointing", True, "--use_cpu", True, "--max_steps", 1),
    *("--per_device_train_batch_size", 1, "--learning_rate", 1e-4, "--mm_projector_lr", 2e-5, "--save_strategy", "no"),
    *("--model_max_length", 2048, "--logging_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0),
)
REWARDING = ("--umed_num_candidates", 2, "--umed_max_new_tokens", 16)


def measured(
    command: Sequence[str], env: dict[str, str], until: Callable[[subprocess.Popen[str]], None] | None = None
) -> dict[str, Any]:
    """Run a command to its end, or ``until`` returns; seconds and peak memory in GB (10^9 bytes)."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = {"RssAnon": 0, "VmHWM": 0}
    watcher = threading.Thread(target=_watch, args=(process.pid, peak))
    watcher.start()
    if until is None:
        said, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{said[-3000:]}\nended with {process.returncode}")
    else:
        until(process)
    seconds = time.monotonic() - start
    process.terminate()
    process.wait()
    watcher.join()
    return {"seconds": seconds, "own_gb": peak["RssAnon"] / 1e9, "resident_gb": peak["VmHWM"] / 1e9}


def _watch(pid: int, peak: dict[str, int]) -> None:
    """Keep the largest values of a process's memory until it ends."""
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        if "VmHWM" not in found:  # a process that has ended and is not waited for yet
            return
        for name in peak:
            peak[name] = max(peak[name], found.get(name, 0))
        time.sleep(0.05)


def _page_is_there(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if "http://" in line:
            with urllib.request.urlopen(line.split("umed serve: ")[1].split()[0]) as page:
                assert page.status == 200
            return
    raise SystemExit("umed serve ended before its page was there")


def make_checkpoint(path: Path, tokenizer: Path, shape: Shape) -> None:
    """Write a random checkpoint in four shards, one at a time."""
    import torch
    from safetensors.torch import save_file

    from umed_plugin.commands.demo.tiny_checkpoint import write_tokenizer

    torch.manual_seed(0)
    path.mkdir(parents=True, exist_ok=True)
    make_tower(path / "vision_tower", shape)
    files.write_json(path / "config.json", configuration(path, shape))
    write_tokenizer(path, tokenizer.read_bytes(), legacy=True, longest=2048)
    names = list(weights(shape))
    weight_map: dict[str, str] = {}
    for number in range(4):
        part = names[number * len(names) // 4 : (number + 1) * len(names) // 4]
        tensors = {name: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02) for name, size in part}
        tensors.update({name: torch.ones_like(value) for name, value in tensors.items() if "norm" in name})
        file = f"model-{number + 1:05}-of-00004.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        del tensors
    total = sum(2 * torch.Size(size).numel() for _, size in names)
    files.write_json(
        path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def pieces(tokenizer: Path) -> int:
    """The size of a sentencepiece model's vocabulary."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()


def weights(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, size) of every tensor of the checkpoint."""
    keys = shape.hidden // shape.heads * shape.key_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield from linears(prefix, shape.hidden, keys, shape.ffn)
        yield f"{prefix}.input_layernorm.weight", (shape.hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    yield "model.mm_projector.0.weight", (shape.hidden, shape.tower_hidden)
    yield "model.mm_projector.0.bias", (shape.hidden,)
    yield "model.mm_projector.2.weight", (shape.hidden, shape.hidden)
    yield "model.mm_projector.2.bias", (shape.hidden,)
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def linears(prefix: str, hidden: int, keys: int, ffn: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, size [out, in]) of a layer's seven products, to which LLaVA's LoRA adds."""
    for name, size in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys), ("o_proj", hidden)):
        yield f"{prefix}.self_attn.{name}.weight", (size, hidden)
    yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)


def configuration(path: Path, shape: Shape) -> dict[str, Any]:
    """``config.json`` as LLaVA-Med 1.5 has it."""
    return {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "mm_vision_tower": str(path / "vision_tower"),
        "mm_hidden_size": shape.tower_hidden,
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
    }


def make_tower(path: Path, shape: Shape) -> None:
    """Write a CLIP tower with random weights, in half precision."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=4 * shape.tower_hidden,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=max(1, shape.tower_hidden // 64),
        image_size=shape.image,
        patch_size=shape.patch,
    )
    CLIPVisionModel(config).half().save_pretrained(path)
    size = {"height": shape.image, "width": shape.image}
    CLIPImageProcessor(size={"shortest_edge": shape.image}, crop_size=size).save_pretrained(path)


def make_records(file: Path) -> None:
    """Eight generated studies, and their records as a recipe builds them."""
    from umed_plugin.commands.demo.studies import make_studies
    from umed_plugin.data.build import build_records
    from umed_plugin.data.recipes.recipe import load_recipe
    from umed_plugin.data.records import save_records

    studies = file.parent / "studies"
    make_studies(studies, train=4, val=2, test=2)
    records = build_records(
        load_recipe("demo_studies"), out_dir=file.parent, data_root=studies, image_aspect_ratio="pad"
    )
    save_records(records, file)


def make_adapter(checkpoint: Path, path: Path, shape: Shape) -> None:
    """Write a LoRA folder as LLaVA's training does, with random values of the size that a training gives them."""
    import torch

    torch.manual_seed(1)
    path.mkdir(parents=True, exist_ok=True)
    keys = shape.hidden // shape.heads * shape.key_heads
    tensors = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in linears(f"model.layers.{layer}", shape.hidden, keys, shape.ffn):
            stem = f"base_model.model.{name[: -len('.weight')]}"
            tensors[f"{stem}.lora_A.weight"] = torch.empty(shape.lora_rank, columns).normal_(std=0.01)
            tensors[f"{stem}.lora_B.weight"] = torch.empty(rows, shape.lora_rank).normal_(std=0.001)
    torch.save(tensors, path / "adapter_model.bin")
    projector = {name: size for name, size in weights(shape) if "mm_projector" in name}
    others = {f"base_model.model.{name}": torch.empty(size).normal_(std=0.02) for name, size in projector.items()}
    torch.save(others, path / "non_lora_trainables.bin")
    shutil.copy(checkpoint / "config.json", path / "config.json")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": shape.lora_rank, "lora_alpha": 2 * shape.lora_rank, "lora_dropout": 0.05, "bias": "none"}
    settings |= {"target_modules": targets, "peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": False}
    files.write_json(path / "adapter_config.json", {**settings, "base_model_name_or_path": str(checkpoint)})


if __name__ == "__main__":
    main()
