"""What packing saves in a step of stage 2: K answers behind one prompt, compared with the prompt repeated for each answer.

The plain side uses LLaVA's own ``generate(num_return_sequences=K)``, and passes over K rows of prompt and answer. The packed side
is what ``--umed_stage rewarding`` does. Both have the same weights (random, LLaVA's own class), images and questions, and answers
of exactly T tokens. A step is: sample, score under the policy, score under the reference, update. The two sides run in turns, and
ratios are medians over the turns. Memory is the peak of a separate process for each side, above the loaded model's.

Vision relevance is timed in a scoring pass, and apart from it as a run does it: 4 tokens of each answer read the KV cache that
sampling has left. With LoRA, sampling is also timed with the adapter as PEFT computes it for each token. With
``--precision bfloat16`` the weights below the adapter are in that precision.

With ``--accumulation A`` a step has A micro-batches. Their answers are sampled together; the table compares that with sampling
each micro-batch alone, in seconds of sampling per question.

It runs on LLaVA's pins and on transformers 5; the title of the table names the versions.

    python benchmarks/rewarding_step.py
    python benchmarks/rewarding_step.py --questions 1 --accumulation 4
    python benchmarks/rewarding_step.py --tuning full --gradient-checkpointing 0 --json step.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import Seconds, add, matrix_flops, now, peak_bytes, ratios, seconds, since, stack
from torch import Tensor

SIDES = ("plain", "packed")
PHASES = ("sampling", "scoring", "update", "scoring + update", "whole step")
# Ways to get the attention in a scoring pass; SDPA cannot return its weights.
RELEVANCE = {"eager": ("without", "hooks", "output_attentions"), "sdpa": ("without", "hooks")}


@dataclass(frozen=True)
class Work:
    """One model and Q queries, for both sides."""

    model: Any
    prompts: Tensor  # [Q, L - patches + 1] token ids with the image token
    images: Tensor  # [Q, 3, S, S]
    answers: Any  # Candidates, T tokens each
    packs: bool  # the model takes packed rows; if not, the packed side's answers read their prompt's KV cache
    options: argparse.Namespace


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. The project's targets are stated for the default sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (
        ("layers", 8),
        ("width", 512),
        ("vocabulary", 32000),
        ("image-size", 336),
        ("prompt-tokens", 64),
        ("answer-tokens", 100),
        ("questions", 2),
        ("candidates", 8),
        ("accumulation", 1),
        ("repetitions", 3),
        ("threads", 2),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--gradient-checkpointing", type=int, choices=(0, 1), default=1)
    parser.add_argument(
        "--attention", choices=tuple(RELEVANCE), default="eager", help="sdpa is not available on LLaVA's pins"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the weights below the adapter"
    )
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser.parse_args(argv)


def build(options: argparse.Namespace) -> Work:
    """Create the model and the queries from a seed."""
    from umed_plugin import patching
    from umed_plugin.model.packing import packing_fault
    from umed_plugin.patches import attention_mask, prepare_llava, split_attention

    prepare_llava()
    patching.apply([attention_mask.PATCH, split_attention.PATCH])
    torch.manual_seed(0)
    model = _llava(options)
    fault = packing_fault(model)
    if fault is not None:
        raise SystemExit(f"this model cannot be packed: {fault}")
    work = queries(_in_precision(_for_training(model, options), options), options, packs=True)
    # LLaVA's own forward pass gives the projector features of the images' dtype.
    return replace(work, images=work.images.to(getattr(torch, options.precision)))


def _in_precision(model: Any, options: argparse.Namespace) -> Any:
    """The model with an adapter in float32 on weights of the chosen precision; rotary frequencies keep theirs."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(getattr(torch, options.precision))
    return model


def queries(model: Any, options: argparse.Namespace, packs: bool) -> Work:
    """Random questions, images and answers for a model, on its device."""
    from umed_plugin.model.forward import IMAGE_TOKEN_INDEX, Candidates

    text = torch.randint(5, options.vocabulary, (options.questions, options.prompt_tokens))
    image = torch.full((options.questions, 1), IMAGE_TOKEN_INDEX)
    prompts = torch.cat([text[:, :8], image, text[:, 8:]], dim=1).to(model.device)
    shape = (options.questions * options.candidates, options.answer_tokens)
    token_ids = torch.randint(5, options.vocabulary, shape).to(model.device)
    images = torch.randn(options.questions, 3, options.image_size, options.image_size)
    return Work(model, prompts, images, Candidates(token_ids, torch.ones_like(token_ids)), packs, options)


def _llava(options: argparse.Namespace) -> Any:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor, CLIPVisionModel
    from transformers import CLIPVisionConfig

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
            attn_implementation=options.attention,
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
    """The queries as a PromptBatch; encodes their images."""
    from umed_plugin.model.forward import embed_prompts, encode_images

    return embed_prompts(work.model, list(work.prompts), encode_images(work.model, work.images))


def sample(work: Work, side: str) -> Any:
    """Token ids of K answers of T tokens to each query."""
    from umed_plugin.model.forward import base_llava
    from umed_plugin.model.sampling import SamplingSettings, generate

    work.model.eval()
    k, steps = work.options.candidates, work.options.answer_tokens
    if side == "packed":
        with torch.no_grad():
            prompts = embedded(work)
        settings = {"max_new_tokens": steps, "temperature": 1.0, "eos_token_id": -1}
        return generate(
            work.model, prompts, SamplingSettings(num_candidates=k, **settings, packed=work.packs)
        ).token_ids
    return base_llava(work.model).generate(
        work.prompts, images=work.images, do_sample=True, top_k=0, num_return_sequences=k, max_new_tokens=steps
    )


def sample_step(work: Work, together: bool) -> None:
    """The answers of all micro-batches of an optimizer step, together or one micro-batch after the other."""
    a = work.options.accumulation
    if together:
        sample(replace(work, prompts=work.prompts.repeat(a, 1), images=work.images.repeat(a, 1, 1, 1)), "packed")
    else:
        for _ in range(a):
            sample(work, "packed")


def logits_of(work: Work, side: str) -> Tensor:
    """[N, T, V] teacher-forced logits of the answers."""
    from umed_plugin.model.forward import answer_pass, base_llava, repeated_inputs

    prompts = embedded(work)
    if side == "packed":
        return answer_pass(work.model, prompts, work.answers, packed=work.packs).logits
    inputs = repeated_inputs(base_llava(work.model), prompts, work.answers)
    return work.model(**inputs, use_cache=False, return_dict=True).logits[:, prompts.mask.shape[1] - 1 : -1].float()


@torch.no_grad()
def score(work: Work, side: str) -> Any:
    """Log-probabilities of the answers."""
    from umed_plugin.model.forward import answer_log_probs

    work.model.eval()
    return answer_log_probs(logits_of(work, side), work.answers).log_probs


def update(work: Work, side: str, old: Tensor) -> Tensor:
    """Gradients of the objective; returns the loss. The optimizer, equal on both sides, is left out."""
    from umed_plugin.model.forward import answer_log_probs
    from umed_plugin.training.objective import ObjectiveSettings, PolicyTensors, grpo_objective

    work.model.train()
    work.model.zero_grad()
    answers = answer_log_probs(logits_of(work, side), work.answers)
    advantages = torch.linspace(-1, 1, len(old), device=old.device)[:, None].expand_as(old)
    mask = work.answers.mask
    settings = ObjectiveSettings(clip_range=0.2)
    policy = PolicyTensors(answers.log_probs, old, old, answers.entropy)
    loss, _ = grpo_objective(policy, advantages, mask, settings, kl_coef=0.04)
    loss.backward()
    return loss


@torch.no_grad()
def score_with_relevance(work: Work, how: str) -> Any:
    """The packed side's scoring pass: attention of 4 tokens of each answer by hooks, all attention returned, or none."""
    from umed_plugin.model.attention import AttentionSettings, attention_on_lesion
    from umed_plugin.model.forward import answer_pass, base_llava

    work.model.eval()
    prompts = embedded(work)
    if how == "hooks":
        named = [list(range(work.options.answer_tokens))[-4:]] * len(work.answers.mask)
        cover = torch.rand(len(work.prompts), prompts.n_patches, generator=torch.Generator().manual_seed(0))
        every_layer = AttentionSettings(range(work.options.layers))
        return attention_on_lesion(work.model, prompts, work.answers, named, cover, every_layer, packed=work.packs)
    if how == "without":
        return answer_pass(work.model, prompts, work.answers, packed=work.packs)
    from umed_plugin import patching
    from umed_plugin.patches import split_attention

    config = base_llava(work.model).config
    config.output_attentions = True
    patching.undo(split_attention.PATCH)  # split attention has no weights of a whole row
    try:
        return answer_pass(work.model, prompts, work.answers, packed=work.packs)
    finally:
        config.output_attentions = False
        patching.apply([split_attention.PATCH])


@torch.no_grad()
def relevance_from_sampling(work: Work) -> Seconds:
    """What vision relevance costs after sampling: 4 tokens of each answer read the KV cache that sampling has left."""
    from umed_plugin.model.attention import AttentionSettings
    from umed_plugin.model.sampled_attention import generate_with_attention
    from umed_plugin.model.sampling import SamplingSettings

    work.model.eval()
    options, prompts, started = work.options, embedded(work), []
    settings = SamplingSettings(
        options.answer_tokens, eos_token_id=-1, temperature=1.0, num_candidates=options.candidates, packed=True
    )

    def naming(candidates: Any) -> list[list[int]]:
        started.append(now())  # all answers are there
        return [list(range(options.answer_tokens))[-4:]] * len(candidates.mask)

    cover = torch.rand(len(work.prompts), prompts.n_patches, generator=torch.Generator().manual_seed(0))
    generate_with_attention(work.model, prompts, settings, naming, cover, AttentionSettings(range(options.layers)))
    return since(started[0])


def sample_with_peft(work: Work) -> None:
    """Sample with the adapter as PEFT computes it for each token."""
    from umed_plugin.model import sampling

    made, sampling.adapter_for_decoding = sampling.adapter_for_decoding, contextlib.nullcontext
    try:
        sample(work, "packed")
    finally:
        sampling.adapter_for_decoding = made


def measure_times(work: Work) -> dict[str, dict[str, list[Seconds]]]:
    """Seconds of every phase and side, run in turns."""
    from rich.progress import track

    old = score(work, "packed")
    times: dict[str, dict[str, list[Seconds]]] = {phase: {side: [] for side in SIDES} for phase in PHASES}
    times["vision relevance"] = {how: [] for how in RELEVANCE[work.options.attention]}
    for _ in track(range(work.options.repetitions), "timing", disable=not sys.stderr.isatty()):
        for side in SIDES:
            times["sampling"][side].append(seconds(lambda side=side: sample(work, side)))
        for side in SIDES:
            times["scoring"][side].append(seconds(lambda side=side: score(work, side)))
        for side in SIDES:
            times["update"][side].append(seconds(lambda side=side: update(work, side, old)))
        if work.options.accumulation > 1:
            for how in ("apart", "together"):
                duration = seconds(lambda how=how: sample_step(work, how == "together"))
                times.setdefault("accumulated sampling", {}).setdefault(how, []).append(duration)
        for how in RELEVANCE[work.options.attention]:
            times["vision relevance"][how].append(seconds(lambda how=how: score_with_relevance(work, how)))
        if work.packs:
            times.setdefault("relevance from sampling", {}).setdefault("cache", []).append(
                relevance_from_sampling(work)
            )
        if work.options.tuning == "lora":
            times.setdefault("adapter", {}).setdefault("peft", []).append(seconds(lambda: sample_with_peft(work)))
    for side in SIDES:
        sampling, scoring, updating = (times[phase][side] for phase in PHASES[:3])
        # Both policy and reference are scored.
        times["scoring + update"][side] = [add(s, s, u) for s, u in zip(scoring, updating)]
        times["whole step"][side] = [add(a, b) for a, b in zip(sampling, times["scoring + update"][side])]
    return times


def measure_memory(work: Work, what: str) -> int:
    """Peak bytes of one side of a step, or of a scoring pass, above the loaded model."""

    def run() -> None:
        torch.set_num_threads(work.options.threads)
        if what in SIDES:
            sample(work, what)
            update(work, what, score(work, what))
        else:
            score_with_relevance(work, what)

    return peak_bytes(run)


def summary(work: Work, times: dict[str, dict[str, list[Seconds]]], memory: dict[str, int]) -> dict[str, Any]:
    """All results: medians of seconds, medians of ratios, bytes."""
    options = work.options
    prefix = (options.image_size // 14) ** 2 + options.prompt_tokens
    k, steps = options.candidates, options.answer_tokens
    relevance = {}
    for how, durations in times["vision relevance"].items():
        compared = ratios(durations, times["vision relevance"]["without"])
        relevance[how] = {
            "s": statistics.median(wall for wall, _ in durations),
            "time_ratio": compared["ratio"],
            "processor_ratio": compared["processor_ratio"],
            "bytes": memory[how],
            "memory_ratio": memory[how] / memory["without"],
        }
    old = score(work, "packed")
    return {
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "stack": stack(),
        "token_limit": k * (prefix + steps) / (prefix + k * steps),
        "prefix_tokens": prefix,
        "phases": {phase: ratios(times[phase]["plain"], times[phase]["packed"]) for phase in PHASES},
        "update_flops": {side: matrix_flops(lambda side=side: update(work, side, old)) for side in SIDES},
        "same_log_probs": (score(work, "plain") - score(work, "packed")).abs().max().item(),
        "step_bytes": {side: memory[side] for side in SIDES},
        "vision_relevance": relevance,
        **accumulated_sampling(times.get("accumulated sampling"), options),
        **relevance_and_adapter(times),
    }


def relevance_and_adapter(times: dict[str, dict[str, list[Seconds]]]) -> dict[str, Any]:
    """A whole pass with hooks against the cache of sampling, and sampling with PEFT's adapter against ours."""
    found: dict[str, Any] = {}
    if "relevance from sampling" in times:
        found["relevance_from_sampling"] = ratios(
            times["vision relevance"]["hooks"], times["relevance from sampling"]["cache"]
        )
    if "adapter" in times:
        found["adapter"] = ratios(times["adapter"]["peft"], times["sampling"]["packed"])
    return found


def accumulated_sampling(times: dict[str, list[Seconds]] | None, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of sampling per question, with the micro-batches of a step apart and together; empty without accumulation."""
    if times is None:
        return {}
    compared = ratios(times["apart"], times["together"])
    asked = options.questions * options.accumulation
    per_question = {"apart": compared["slow_s"] / asked, "together": compared["fast_s"] / asked}
    shown = {name: compared[name] for name in ("ratio", "ratio_range", "processor_ratio")}
    return {"accumulated_sampling": {"s_per_question": per_question, **shown}}


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120)
    limit = results["token_limit"]
    head = ("plain", "packed", "ratio", "of limit", "lowest - highest", "processor time")
    table = Table("", *head, title=f"a step of stage 2, {results['stack']}")
    for phase, row in results["phases"].items():
        spread = " - ".join(f"{ratio:.1f}" for ratio in row["ratio_range"])
        medians = f"{row['slow_s']:.2f} s", f"{row['fast_s']:.2f} s", f"{row['ratio']:.2f}x"
        table.add_row(phase, *medians, f"{row['ratio'] / limit:.0%}", spread, f"{row['processor_ratio']:.2f}x")
    plain, packed = (results["step_bytes"][side] / 2**20 for side in SIDES)
    table.add_row("peak memory", f"{plain:.0f} MiB", f"{packed:.0f} MiB", f"{plain / packed:.2f}x", "", "", "")
    plain, packed = (results["update_flops"][side] / 1e9 for side in SIDES)
    counts = f"{plain:.0f} GFLOP", f"{packed:.0f} GFLOP", f"{plain / packed:.2f}x"
    table.add_row("products of an update", *counts, f"{plain / packed / limit:.0%}", "", "")
    console.print(table)
    console.print(
        f"The number of tokens alone allows {limit:.2f}x. Packing also skips the prompt's logits, which allows more. The "
        f"log-probabilities of both sides differ by at most {results['same_log_probs']:.0e}."
    )
    if "accumulated_sampling" in results:
        row, a = results["accumulated_sampling"], results["options"]["accumulation"]
        apart, together = (row["s_per_question"][how] for how in ("apart", "together"))
        console.print(
            f"Sampling with {a} micro-batches a step: {together:.3f} s a question together, {apart:.3f} s apart, "
            f"{row['ratio']:.2f}x ({' - '.join(f'{ratio:.2f}' for ratio in row['ratio_range'])}), in processor time "
            f"{row['processor_ratio']:.2f}x."
        )
    for name, text in (
        ("relevance_from_sampling", "Vision relevance, a pass of its own against sampling's KV cache"),
        ("adapter", f"Sampling in {results['options']['precision']}, PEFT's adapter against ours"),
    ):
        if name in results:
            row = results[name]
            spread = " - ".join(f"{ratio:.2f}" for ratio in row["ratio_range"])
            console.print(
                f"{text}: {row['slow_s']:.2f} s, {row['fast_s']:.2f} s, {row['ratio']:.2f}x ({spread}; processor time "
                f"{row['processor_ratio']:.2f}x)."
            )
    head = ("time", "", "processor time", "peak memory", "")
    table = Table("", *head, title="vision relevance in a scoring pass")
    for how, row in results["vision_relevance"].items():
        names = ("time_ratio", "processor_ratio", "memory_ratio")
        wall, processor, memory = ("" if how == "without" else f"{row[name] - 1:+.1%}" for name in names)
        table.add_row(how, f"{row['s']:.2f} s", wall, processor, f"{row['bytes'] / 2**20:.0f} MiB", memory)
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(argv)
    torch.set_num_threads(1)
    work = build(options)
    memory = {what: measure_memory(work, what) for what in (*SIDES, *RELEVANCE[options.attention])}
    torch.set_num_threads(options.threads)
    times = measure_times(work)
    results = summary(work, times, memory)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
