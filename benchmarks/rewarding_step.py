"""What packing saves in a step of stage 2: K answers beside one prompt against the prompt repeated for each.

Plain is LLaVA's own ``generate(num_return_sequences=K)``, and passes over K rows of prompt and answer. Packed is what
``--umed_stage rewarding`` does. Both have the same weights (random, LLaVA's own class), the same image and question, and answers
of exactly T tokens. A step is: sample, score under the policy, score under the reference, update. Times are medians of the ratios
of runs that take turns; memory is the peak of a process of its own for each side, above what the loaded model takes.

    python benchmarks/rewarding_step.py
    python benchmarks/rewarding_step.py --tuning full --gradient-checkpointing 0 --json step.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDES = ("plain", "packed")
PHASES = ("sampling", "scoring", "update", "scoring + update", "whole step")
RELEVANCE = ("without", "hooks", "output_attentions")


@dataclass(frozen=True)
class Work:
    """One model and one query, for both sides."""

    model: Any
    prompt: Tensor  # [L - patches + 1] token ids with the image token
    image: Tensor  # [1, 3, S, S]
    answers: Any  # Candidates, T tokens each
    options: argparse.Namespace


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the shape that the project's targets are stated for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (
        ("layers", 8),
        ("width", 512),
        ("vocabulary", 32000),
        ("image-size", 336),
        ("prompt-tokens", 64),
        ("answer-tokens", 100),
        ("candidates", 8),
        ("repetitions", 5),
        ("threads", 2),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--gradient-checkpointing", type=int, choices=(0, 1), default=1)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def build(options: argparse.Namespace) -> Work:
    """Make the model and the query from a seed, so that every process has the same."""
    from umed_plugin.patches import attention_mask

    from umed_plugin import patching
    from umed_plugin.packing import packing_fault
    from umed_plugin.rollout import IMAGE_TOKEN_INDEX, Candidates

    patching.apply([attention_mask.PATCH])
    torch.manual_seed(0)
    model = _llava(options)
    fault = packing_fault(model)
    if fault is not None:
        raise SystemExit(f"this model cannot be packed: {fault}")
    model = _for_training(model, options)
    text = torch.randint(5, options.vocabulary, (options.prompt_tokens,))
    prompt = torch.cat([text[:8], torch.tensor([IMAGE_TOKEN_INDEX]), text[8:]])
    shape = (options.candidates, options.answer_tokens)
    answers = Candidates(torch.randint(5, options.vocabulary, shape), torch.ones(shape, dtype=torch.long))
    return Work(model, prompt, torch.randn(1, 3, options.image_size, options.image_size), answers, options)


def _llava(options: argparse.Namespace) -> Any:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=options.image_size,
        patch_size=14,
    )
    with tempfile.TemporaryDirectory(prefix="umed-") as folder, contextlib.redirect_stdout(io.StringIO()):
        CLIPVisionModel(tower).save_pretrained(folder)
        CLIPImageProcessor().save_pretrained(folder)
        config = LlavaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=options.width * 43 // 16,  # Llama 7B: 11008 / 4096
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.width // 64),
            max_position_embeddings=4096,
            mm_vision_tower=folder,
            mm_hidden_size=tower.hidden_size,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            mm_use_im_start_end=False,
            use_mm_proj=True,
            tune_mm_mlp_adapter=False,
        )
        model = LlavaLlamaForCausalLM(config)
        model.get_vision_tower().load_model()
    # No answer may end before its T tokens.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _for_training(model: Any, options: argparse.Namespace) -> Any:
    if options.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        pattern = rf".*model\.layers\..*({'|'.join(layers)})"
        model = get_peft_model(model, LoraConfig(r=16, target_modules=pattern, task_type="CAUSAL_LM"))
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def embedded(work: Work) -> Any:
    """The query as a PromptBatch, its image encoded anew."""
    from umed_plugin.rollout import embed_prompts, encode_images

    return embed_prompts(work.model, [work.prompt], encode_images(work.model, work.image))


def sample(work: Work, side: str) -> Any:
    """K answers of T tokens: their ids."""
    from umed_plugin.rollout import base_llava, generate

    work.model.eval()
    k, steps = work.options.candidates, work.options.answer_tokens
    if side == "packed":
        with torch.no_grad():
            prompts = embedded(work)
        settings = {"max_new_tokens": steps, "temperature": 1.0, "eos_token_id": -1}
        return generate(work.model, prompts, num_candidates=k, **settings, packed=True).token_ids
    return base_llava(work.model).generate(
        work.prompt[None], images=work.image, do_sample=True, top_k=0, num_return_sequences=k, max_new_tokens=steps
    )


def logits_of(work: Work, side: str) -> Tensor:
    """[K, T, V] teacher-forced logits of the answers."""
    from umed_plugin.rollout import answer_pass, base_llava, repeated_inputs

    prompts = embedded(work)
    if side == "packed":
        return answer_pass(work.model, prompts, work.answers, packed=True).logits
    inputs = repeated_inputs(base_llava(work.model), prompts, work.answers)
    return work.model(**inputs, use_cache=False, return_dict=True).logits[:, prompts.mask.shape[1] - 1 : -1]


@torch.no_grad()
def score(work: Work, side: str) -> Any:
    """Log-probabilities of the answers."""
    from umed_plugin.rollout import answer_log_probs

    work.model.eval()
    return answer_log_probs(logits_of(work, side), work.answers).log_probs


def update(work: Work, side: str, old: Tensor) -> Tensor:
    """Gradients of the objective; returns the loss. The optimizer is the same for both sides and left out."""
    from umed_plugin.objective import ObjectiveSettings, grpo_objective
    from umed_plugin.rollout import answer_log_probs

    work.model.train()
    work.model.zero_grad()
    passed = answer_log_probs(logits_of(work, side), work.answers)
    advantages = torch.linspace(-1, 1, len(old))[:, None].expand_as(old)
    mask = work.answers.mask
    settings = ObjectiveSettings(clip_range=0.2)
    loss, _ = grpo_objective(passed.log_probs, old, old, passed.entropy, advantages, mask, settings, kl_coef=0.04)
    loss.backward()
    return loss


@torch.no_grad()
def score_with_relevance(work: Work, how: str) -> Any:
    """The packed side's scoring pass: with attention of 4 tokens of each answer by hooks, with all returned, or with none."""
    from umed_plugin.attention import attention_on_lesion
    from umed_plugin.rollout import answer_pass, base_llava

    work.model.eval()
    prompts, layers = embedded(work), list(range(work.options.layers))
    if how == "hooks":
        named = [list(range(work.options.answer_tokens))[-4:]] * work.options.candidates
        cover = torch.rand(1, prompts.n_patches)
        return attention_on_lesion(work.model, prompts, work.answers, named, cover, layers, packed=True)
    config = base_llava(work.model).config
    config.output_attentions = how == "output_attentions"
    try:
        return answer_pass(work.model, prompts, work.answers, packed=True)
    finally:
        config.output_attentions = False


def seconds(run: Callable[[], Any]) -> Tensor:
    """[2] wall time and processor time of one call. The latter is what a machine that is shared with others leaves comparable."""
    start, used = time.perf_counter(), time.process_time()
    run()
    return torch.tensor([time.perf_counter() - start, time.process_time() - used])


def measure_times(work: Work) -> dict[str, dict[str, list[Tensor]]]:
    """Seconds of every phase and side, in runs that take turns."""
    from rich.progress import track

    old = score(work, "packed")
    times: dict[str, dict[str, list[Tensor]]] = {phase: {side: [] for side in SIDES} for phase in PHASES}
    times["vision relevance"] = {how: [] for how in RELEVANCE}
    for _ in track(range(work.options.repetitions), "timing", disable=not sys.stderr.isatty()):
        for side in SIDES:
            times["sampling"][side].append(seconds(lambda side=side: sample(work, side)))
        for side in SIDES:
            times["scoring"][side].append(seconds(lambda side=side: score(work, side)))
        for side in SIDES:
            times["update"][side].append(seconds(lambda side=side: update(work, side, old)))
        for how in RELEVANCE:
            times["vision relevance"][how].append(seconds(lambda how=how: score_with_relevance(work, how)))
    for side in SIDES:
        sampling, scoring, updating = (times[phase][side] for phase in PHASES[:3])
        # Policy and reference are scored.
        times["scoring + update"][side] = [2 * s + u for s, u in zip(scoring, updating)]
        times["whole step"][side] = [a + b for a, b in zip(sampling, times["scoring + update"][side])]
    return times


def measure_memory(work: Work, what: str) -> int:
    """Peak bytes of a step's side or of a scoring pass, above the loaded model, in a process of its own.

    To be called before anything has run on several threads, which a fork would not have.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_send_peak, args=(work, what, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"measuring the memory of {what} failed; see above.") from None
    finally:
        child.join()


def _send_peak(work: Work, what: str, sender: Any) -> None:
    # Freed tensors go back to the system at once, so that the peak is that of what was alive (malloc.h).
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
    libc.mallopt(trim_threshold, 0)
    libc.mallopt(mmap_threshold, 65536)
    torch.set_num_threads(work.options.threads)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    if what in SIDES:
        sample(work, what)
        update(work, what, score(work, what))
    else:
        score_with_relevance(work, what)
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def summary(work: Work, times: dict[str, dict[str, list[Tensor]]], memory: dict[str, int]) -> dict[str, Any]:
    """All figures: medians of seconds, medians of ratios, bytes."""
    options = work.options
    prefix = (options.image_size // 14) ** 2 + options.prompt_tokens
    k, steps = options.candidates, options.answer_tokens
    phases = {}
    for phase in PHASES:
        plain, packed = (torch.stack(times[phase][side]) for side in SIDES)
        ratios = plain / packed
        phases[phase] = {
            "plain_s": median(plain[:, 0]),
            "packed_s": median(packed[:, 0]),
            "ratio": median(ratios[:, 0]),
            "ratio_range": [ratios[:, 0].min().item(), ratios[:, 0].max().item()],
            "processor_ratio": median(ratios[:, 1]),
        }
    relevance = {}
    for how in RELEVANCE:
        column, without = (torch.stack(times["vision relevance"][name]) for name in (how, "without"))
        relevance[how] = {
            "s": median(column[:, 0]),
            "time_ratio": median(column[:, 0] / without[:, 0]),
            "processor_ratio": median(column[:, 1] / without[:, 1]),
            "bytes": memory[how],
            "memory_ratio": memory[how] / memory["without"],
        }
    return {
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "token_limit": k * (prefix + steps) / (prefix + k * steps),
        "prefix_tokens": prefix,
        "phases": phases,
        "same_log_probs": (score(work, "plain") - score(work, "packed")).abs().max().item(),
        "step_bytes": {side: memory[side] for side in SIDES},
        "vision_relevance": relevance,
    }


def median(values: Tensor) -> float:
    """The middle one, or the mean of the two."""
    return statistics.median(values.tolist())


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120)
    limit = figures["token_limit"]
    head = ("plain", "packed", "ratio", "of limit", "lowest - highest", "processor time")
    table = Table("", *head, title="a step of stage 2")
    for phase, row in figures["phases"].items():
        spread = " - ".join(f"{ratio:.1f}" for ratio in row["ratio_range"])
        medians = f"{row['plain_s']:.2f} s", f"{row['packed_s']:.2f} s", f"{row['ratio']:.2f}x"
        table.add_row(phase, *medians, f"{row['ratio'] / limit:.0%}", spread, f"{row['processor_ratio']:.2f}x")
    plain, packed = (figures["step_bytes"][side] / 2**20 for side in SIDES)
    table.add_row("peak memory", f"{plain:.0f} MiB", f"{packed:.0f} MiB", f"{plain / packed:.2f}x", "", "", "")
    console.print(table)
    console.print(
        f"The count of tokens alone allows {limit:.2f}x; the logits of the prompt, which packing leaves out, more. The "
        f"log-probabilities of both sides differ by {figures['same_log_probs']:.0e} at most."
    )
    head = ("time", "", "processor time", "peak memory", "")
    table = Table("", *head, title="vision relevance in a scoring pass")
    for how, row in figures["vision_relevance"].items():
        names = ("time_ratio", "processor_ratio", "memory_ratio")
        wall, processor, memory = ("" if how == "without" else f"{row[name] - 1:+.1%}" for name in names)
        table.add_row(how, f"{row['s']:.2f} s", wall, processor, f"{row['bytes'] / 2**20:.0f} MiB", memory)
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(argv)
    torch.set_num_threads(1)
    work = build(options)
    memory = {what: measure_memory(work, what) for what in (*SIDES, *RELEVANCE)}
    torch.set_num_threads(options.threads)
    times = measure_times(work)
    figures = summary(work, times, memory)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
