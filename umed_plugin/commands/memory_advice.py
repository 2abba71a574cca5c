"""What is said of a plan's memory: whether it fits the GPU, and what to change where it does not.

The figures are those of `umed_plugin.commands.memory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from umed_plugin.checkpoints.tower_config import tower_sizes
from umed_plugin.commands.machine import Machine
from umed_plugin.commands.memory import RESERVE, ModelSize, Work, kv_cache, stage_memory
from umed_plugin.flags.rules import REWARDING, TUNING

GIGA = 1e9
# The share of a GPU up to which a plan is said to fit.
_USABLE = 0.95

# What `umed upgrade` starts by default on a GPU (a test holds it against the settings).
DEFAULT_PLAN = {
    TUNING: Work(rank=128, half=True, checkpointing=True, fused=True, rows=8, ddp=True),
    REWARDING: Work(
        rank=128, half=True, checkpointing=True, fused=True, rows=4, candidates=8, answer=128, sampled=8, ddp=True
    ),
}
# The tower whose sizes are those of `Tower`, also where it is not on this machine.
_USUAL_TOWER = "openai/clip-vit-large-patch14-336"
EVALUATED_TOGETHER = 16  # studies of a batch of `umed evaluate` in that plan
EVALUATED_ANSWER = 128  # tokens of an answer there


def memory_lines(
    config: Mapping[str, Any],
    works: Mapping[str, Work],
    machine: Machine,
    evaluated_together: int = EVALUATED_TOGETHER,
    answer: int = EVALUATED_ANSWER,
) -> list[str]:
    """For each stage, the memory that one GPU needs, whether it is there, and what to change where it is not.

    Args:
        config: ``config.json`` of the checkpoint.
        works: stage -> what one of its processes holds.
        machine: with the GPU; without one, the lines only name the need.
        evaluated_together: studies of a batch of the evaluations, which begin and end each stage.
        answer: tokens of an answer there, at most.
    """
    size, assumed = _size_of(config)
    text = max(work.text for work in works.values())
    lines = [f"memory a GPU, for {size.patches} image tokens{assumed} and {text} tokens of text:"]
    for number, (name, work) in enumerate(works.items(), start=1):
        lines.append(f"stage {number}, {name.replace('_', ' ')}: {summary(stage_memory(size, work))}")
        lines += [f"  {_verdict(size, work, machine.gpu_bytes)}"] if machine.gpus else []
    length = size.patches + text + answer
    lines.append(f"evaluation: {summary(evaluation_memory(size, evaluated_together, length))}")
    if machine.gpus:
        lines.append(f"  {_verdict_of_evaluation(size, evaluated_together, length, machine.gpu_bytes)}")
    return lines


def _size_of(config: Mapping[str, Any]) -> tuple[ModelSize, str]:
    """The sizes of a checkpoint, and what is assumed of its tower, as brackets behind its image tokens."""
    name = str(config.get("mm_vision_tower", config.get("vision_tower")) or "")
    tower = tower_sizes(name)
    assumed = "" if tower is not None or name == _USUAL_TOWER else " (assumed: CLIP ViT-L/14-336)"
    return ModelSize.of(config, tower), assumed


def evaluation_memory(size: ModelSize, rows: int, length: int) -> dict[str, float]:
    """What `umed evaluate` needs on a GPU, where a checkpoint answers in float16, part -> bytes.

    Args:
        size: of the checkpoint.
        rows: studies of a batch.
        length: tokens of image, question and answer.
    """
    return {"weights": 2.0 * size.weights, "KV cache": kv_cache(size, 2, rows, length), "reserve": RESERVE}


def _verdict_of_evaluation(size: ModelSize, rows: int, length: int, there: int) -> str:
    if fits(evaluation_memory(size, rows, length), there):
        return f"fits the GPU's {there / GIGA:.1f} GB."
    fewer = rows
    while fewer > 1:
        fewer //= 2
        if fits(evaluation_memory(size, fewer, length), there):
            return f"does NOT fit the GPU's {there / GIGA:.1f} GB. Set evaluation.batch_size: {fewer}."
    return (
        f"does NOT fit the GPU's {there / GIGA:.1f} GB: a checkpoint answers with weights of 16 bits, also where bits: 4 trains. "
        "Use a larger GPU."
    )


def _verdict(size: ModelSize, work: Work, there: int) -> str:
    if fits(stage_memory(size, work), there):
        return f"fits the GPU's {there / GIGA:.1f} GB."
    changes = remedies(size, work, there)
    if not changes:
        larger = "Use a larger GPU, or DeepSpeed's ZeRO-3 over several."
        return f"does NOT fit the GPU's {there / GIGA:.1f} GB, whatever the batch. {larger}"
    # Of several batch sizes or ranks, the last one holds.
    last = {words.split(":")[0]: words for words, _ in changes}
    need = sum(stage_memory(size, changes[-1][1]).values())
    over_4_bits = stage_memory(size, replace(work, bits=4))
    instead = ""
    if work.rank and changes[-1][1].bits != 4 and fits(over_4_bits, there):
        instead = f" Or set bits: 4 alone: about {sum(over_4_bits.values()) / GIGA:.1f} GB."
    changed = f"Set {'; '.join(last.values())}: about {need / GIGA:.1f} GB."
    return f"does NOT fit the GPU's {there / GIGA:.1f} GB. {changed}{instead}"


def summary(parts: Mapping[str, float]) -> str:
    """One line: the sum and its parts, in GB of 10^9 bytes."""
    named = " + ".join(f"{need / GIGA:.1f} {part}" for part, need in parts.items())
    return f"about {sum(parts.values()) / GIGA:.1f} GB: {named}"


def fits(parts: Mapping[str, float], gpu_bytes: int) -> bool:
    """Whether it fits a GPU, with a little room."""
    return sum(parts.values()) <= _USABLE * gpu_bytes


def remedies(size: ModelSize, work: Work, gpu_bytes: int) -> list[tuple[str, Work]]:
    """The first change that makes the work fit, or the changes that together do; (what to change, the work after it).

    Empty where nothing helps: the model needs a larger GPU, or DeepSpeed with ZeRO-3 over several.
    """
    for changes in (_changes(work), _changes_over_4_bits(work)):
        taken: list[tuple[str, Work]] = []
        for words, changed in changes:
            current = taken[-1][1] if taken else work
            after = replace(current, **changed)
            if sum(stage_memory(size, after).values()) >= sum(stage_memory(size, current).values()):
                continue  # it would change nothing here, such as a smaller update where sampling needs most
            taken.append((words, after))
            if fits(stage_memory(size, after), gpu_bytes):
                return taken
    return []


def _changes(work: Work) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes in the order in which they cost least; half the batch keeps the step by twice the accumulation."""
    yield "gradient_checkpointing: true", {"checkpointing": True}
    yield from _smaller_batches(work)
    if not work.rank:
        yield "method: lora", {"rank": 128}


def _changes_over_4_bits(work: Work) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes where a smaller batch alone is not enough: a base of 4 bits first, which saves more than a smaller adapter."""
    yield "gradient_checkpointing: true", {"checkpointing": True}
    if not work.rank:
        yield "method: lora", {"rank": 128}
    yield "bits: 4", {"bits": 4}
    yield from _smaller_batches(work)
    rank = work.rank or 128
    while rank > 16:
        rank //= 2
        yield f"lora.r: {rank} (and lora.alpha: {2 * rank})", {"rank": rank}


def _smaller_batches(work: Work) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fewer questions sampled at a time, which costs nothing, and fewer rows learnt from at a time, in turn."""
    rows, sampled = work.rows, work.sampled
    while rows > 1 or sampled > 1:
        if sampled > 1:
            sampled //= 2
            yield f"flags.umed_sampling_batch_size: {sampled}", {"sampled": sampled}
        if rows > 1:
            rows //= 2
            yield f"batch_size: {rows} (and accumulation x {work.rows // rows})", {"rows": rows}
