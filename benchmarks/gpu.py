"""Both stages on a LLaVA of 7 billion parameters on one GPU: step times, tokens per second, memory, share of the matrix rate.

It needs only torch and transformers 5: no LLaVA, no network, no checkpoint. The model is that of `bare_llava`, in bfloat16.
Packing, sampling, scoring, objective, reference and vision relevance are the plugin's own code.

Full fine-tuning with AdamW needs 12 to 16 bytes per parameter, more than one GPU of 80 GB has. So the benchmark trains LoRA
and the projector, both in bfloat16, with gradient checkpointing and AdamW. LoRA has rank 128, as in LLaVA's
``finetune_lora.sh``, on every linear layer of the language model.

- Matrix rate: operations per second of a product of two large square matrices in the model's dtype, measured in the same run.
- Share: matrix operations per second, as torch counts them, divided by the matrix rate. Operations that gradient checkpointing
  repeats count; those inside flash attention are invisible to torch.
- Stage 1: a step on ``--batch`` questions with one answer each, and logits of all positions, as LLaVA computes them.
- Stage 2, plain: ``generate(num_return_sequences=K)`` and passes over K rows of prompt and answer. Packed: what
  ``--umed_stage rewarding`` does, with split attention. If packed rows cannot be computed, the answers read the prompt's KV
  cache instead; under gradient checkpointing they repeat the prompt. The table says so.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --layers 2 --hidden 256 --tower-layers 2 --image-size 56 --answer-tokens 8
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral  # noqa: F401  the patch changes both
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the plugin is not installed on a bare machine

from bare_llava import Llava, build
from measuring import stack
from rewarding_step import Work, queries, sample, score, score_with_relevance, update

from umed_plugin.model.forward import embed_prompts, encode_images, repeated_inputs
from umed_plugin.model.packing import packing_fault
from umed_plugin.model.split_attention import attends_split
from umed_plugin.patches import split_attention
from umed_plugin.patching import Recorder
from umed_plugin.training.reference import ReferencePolicy

Results = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. The defaults are a 7B model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default, text in (
        ("layers", 32, "of the language model"),
        ("hidden", 4096, "width of the language model, a multiple of 128"),
        ("vocabulary", 32000, "tokens"),
        ("tower-layers", 24, "of the vision tower, whose width is 1024"),
        ("image-size", 336, "pixels, a multiple of 14"),
        ("prompt-tokens", 64, "of text"),
        ("answer-tokens", 100, "T"),
        ("batch", 8, "questions per step of stage 1"),
        ("questions", 4, "per step of stage 2"),
        ("candidates", 8, "K answers per question of stage 2"),
        ("lora-rank", 128, ""),
        ("repetitions", 3, "of each measurement, after a warm-up"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--gradient-checkpointing", type=int, choices=(0, 1), default=1)
    parser.add_argument("--attention", nargs="*", help="default: sdpa, and flash_attention_2 where it is installed")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser.parse_args(argv)


class Stopwatch:
    """Measures calls on one device: seconds, peak memory, matrix operations."""

    def __init__(self, options: argparse.Namespace, rate: float = float("nan")) -> None:
        self.device, self.repetitions, self.rate = torch.device(options.device), options.repetitions, rate

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def measure(self, run: Callable[[], Any], tokens: int) -> Results | None:
        """Results of a call that works on ``tokens`` tokens; None if the device has too little memory for it."""
        try:
            return self._measured(run, tokens)
        except torch.OutOfMemoryError:
            pass
        # After the handler: inside it, the error would keep the call's tensors alive.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _measured(self, run: Callable[[], Any], tokens: int) -> Results:
        with FlopCounterMode(display=False) as counter:
            run()
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = statistics.median(self._seconds(run) for _ in range(self.repetitions))
        operations = counter.get_total_flops()
        return {
            "s": seconds,
            "tokens_per_s": tokens / seconds,
            "operations": operations,
            "share": operations / seconds / self.rate,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        }

    def _seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start


def matrix_rate(options: argparse.Namespace) -> float:
    """Operations per second of a product of two square matrices, which are large on an accelerator."""
    size = 1024 if options.device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=options.device).to(getattr(torch, options.dtype))
    products = Stopwatch(options).measure(lambda: [a @ b for _ in range(10)], 0)
    assert products is not None
    return products["operations"] / products["s"]


def instruction_tuning(work: Work) -> None:
    """A step of stage 1 up to the gradients: the loss of LLaVA's forward pass on prompts followed by answers."""
    model = work.model
    model.train()
    model.zero_grad()
    prompts = embed_prompts(model, list(work.prompts), encode_images(model, work.images))
    unseen = torch.full_like(prompts.mask, -100)
    labels = torch.cat([unseen, work.answers.token_ids], dim=1)
    model(**repeated_inputs(model, prompts, work.answers), labels=labels, use_cache=False).loss.backward()


def rewarding(work: Work, side: str, optimizer: Any, watch: Stopwatch) -> dict[str, Results | None]:
    """The phases of a step of stage 2 on one side."""
    reference = ReferencePolicy(work.model)
    old = torch.zeros_like(work.answers.token_ids, dtype=torch.float32)

    def score_reference() -> None:
        with reference.as_reference(work.model):
            score(work, side)

    phases = {
        "sampling": lambda: sample(work, side),
        "scoring": lambda: score(work, side),
        "reference": score_reference,
        "update": lambda: update(work, side, old),
        "optimizer": optimizer.step,
    }
    tokens = work.answers.token_ids.numel()
    return with_sum({name: watch.measure(run, tokens) for name, run in phases.items()}, tokens, watch)


def with_sum(phases: dict[str, Results | None], tokens: int, watch: Stopwatch) -> dict[str, Results | None]:
    """The phases, and their sum as ``step``."""
    parts = list(phases.values())
    if any(part is None for part in parts):
        return {**phases, "step": None}
    measured: list[Results] = [part for part in parts if part is not None]
    seconds, operations = sum(part["s"] for part in measured), sum(part["operations"] for part in measured)
    peaks = [part["peak_bytes"] for part in measured]
    step = {
        "s": seconds,
        "tokens_per_s": tokens / seconds,
        "operations": operations,
        "share": operations / seconds / watch.rate,
        "peak_bytes": None if None in peaks else max(peaks),
    }
    return {**phases, "step": step}


def one_attention(model: Llava, attention: str, options: argparse.Namespace, watch: Stopwatch) -> Results:
    """All results for one attention implementation."""
    model.set_attn_implementation(attention)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-6)
    model.eval()
    fault = packing_fault(model)
    torch.manual_seed(0)

    one_each = argparse.Namespace(**{**vars(options), "questions": options.batch, "candidates": 1})
    work = queries(model, one_each, packs=fault is None)
    tokens = options.batch * ((options.image_size // 14) ** 2 + options.prompt_tokens + options.answer_tokens)
    first = {"gradients": lambda: instruction_tuning(work), "optimizer": optimizer.step}
    stage_1 = with_sum({name: watch.measure(run, tokens) for name, run in first.items()}, tokens, watch)

    work = queries(model, options, packs=fault is None)
    stage_2 = {side: rewarding(work, side, optimizer, watch) for side in ("plain", "packed")}
    relevance = {
        how: watch.measure(lambda how=how: score_with_relevance(work, how), work.answers.token_ids.numel())
        for how in ("without", "hooks")
    }
    # What ran out of memory above would do so here too.
    fits = stage_2["plain"]["scoring"] and stage_2["packed"]["scoring"] and relevance["hooks"]
    return {
        "packing_fault": fault,
        "stage_1": stage_1,
        "stage_2": stage_2,
        "vision_relevance": {
            **relevance,
            "mean": score_with_relevance(work, "hooks")[0].mean().item() if fits else None,
        },
        "log_probs_differ_by": (score(work, "plain") - score(work, "packed")).abs().max().item() if fits else None,
    }


def measure(options: argparse.Namespace) -> Results:
    """All results."""
    flash = ["flash_attention_2"] if is_flash_attn_2_available() and options.device != "cpu" else []
    rate = matrix_rate(options)
    split_attention.change(Recorder())  # patches are applied when LLaVA is imported, which is not here
    model = build(options)
    if not attends_split(model):
        raise SystemExit("the layers of this transformers do not split their attention, as those of a training run do")
    watch = Stopwatch(options, rate)
    on_gpu = torch.device(options.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(options.device) if on_gpu else platform.processor() or options.device,
        "date": time.strftime("%Y-%m-%d"),
        "stack": stack(),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "parameters": model.num_parameters(),
        "trainable": model.num_parameters(only_trainable=True),
        "matrix_rate": rate,
        "attention": {
            name: one_attention(model, name, options, watch) for name in options.attention or ["sdpa", *flash]
        },
    }


def show(results: Results) -> None:
    """Print the tables."""
    options = results["options"]
    print(
        f"{results['device']}, {results['date']}, {results['stack']}\n"
        f"{results['parameters'] / 1e9:.2f} G parameters, random, {options['dtype']}; trainable: "
        f"{results['trainable'] / 1e6:.1f} M (LoRA of rank {options['lora_rank']} and the projector, not the whole model), "
        f"gradient checkpointing {options['gradient_checkpointing']}\n"
        f"prompts of {(options['image_size'] // 14) ** 2} image and {options['prompt_tokens']} text tokens, answers of "
        f"{options['answer_tokens']}; matrix rate {results['matrix_rate'] / 1e12:.2f} T operations/s"
    )
    for name, of_attention in results["attention"].items():
        how = f": {of_attention['packing_fault']}, so nothing is packed" if of_attention["packing_fault"] else ""
        print(f"\n{name}{how}")
        print(f"{'stage 1':12}{_HEAD}   {options['batch']} questions, one answer each")
        for phase, row in of_attention["stage_1"].items():
            print(f"{phase:12}{_cells(row)}")
        for side, phases in of_attention["stage_2"].items():
            print(f"{'stage 2':12}{_HEAD}   {side}: {options['questions']} questions, K = {options['candidates']}")
            for phase, row in phases.items():
                other = of_attention["stage_2"]["plain"][phase]
                ratio = (
                    f"   {other['s'] / row['s']:.2f} times as fast as plain"
                    if row and other and row is not other
                    else ""
                )
                print(f"{phase:12}{_cells(row)}{ratio}")
        look = of_attention["vision_relevance"]
        if look["without"] and look["mean"] is not None:
            print(
                f"vision relevance by hooks: {look['hooks']['s'] / look['without']['s'] - 1:+.1%} of a scoring pass, mean "
                f"{look['mean']:.4f}; log-probabilities of plain and packed differ by at most "
                f"{of_attention['log_probs_differ_by']:.0e}"
            )


_HEAD = f"{'seconds':>10}{'tokens/s':>12}{'share':>8}{'peak':>12}"


def _cells(row: Results | None) -> str:
    if row is None:
        return f"{'out of memory':>22}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB"
    return f"{row['s']:10.4f}{row['tokens_per_s']:12.0f}{row['share']:8.1%}{peak:>12}"


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(argv)
    results = measure(options)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
