"""Will it fit? The memory of one GPU that each stage of a plan needs, estimated from sizes alone.

Weights, gradients and Adam's averages are counted exactly. Activations are the tensors that autograd saves for the backward pass.
Their bytes per token were counted with ``torch.autograd.graph.saved_tensors_hooks``, under torch 2.0.1 with transformers 4.36
and under torch 2.13 with transformers 5.23. The two differ by up to 8 %, and the estimate takes their mean. With gradient
checkpointing, each layer keeps its input, and one layer at a time is computed again.

Not counted are the CUDA context, kernels' workspaces and fragmentation: `RESERVE` stands for them. DeepSpeed's configuration
is not read: with it, the estimate is that of a run without.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from umed_plugin.commands.machine import Machine
from umed_plugin.files import read_object
from umed_plugin.flags.rules import REWARDING, TUNING

GIGA = 1e9
RESERVE = 1.5e9
# The share of a GPU up to which a plan is said to fit.
_USABLE = 0.95
# A float32 weight's gradient, and Adam's two averages.
_BYTES_OF_GRADIENT, _BYTES_OF_ADAM = 4, 8
# 4-bit weights with their scales (bitsandbytes, double quantization).
_BYTES_OF_4_BITS = 0.52
# Over them layer norms, and all that products return, are in float32 also under autocast; counted as the table below.
_SAVED_OVER_4_BITS = 1.25
# Text of question and answer beside the image's patches, in tokens: what a record of the shipped recipes has at most.
TEXT_TOKENS = 192


@dataclass(frozen=True)
class Saved:
    """Bytes per token that one layer saves: for each channel of ``hidden``, ``ffn``, keys and values, rank; and of attention.

    Attributes:
        ends: bytes for each channel of ``hidden`` that are saved once, before the first layer and behind the last.
        attention: bytes for each head and pair of tokens; 0 where a fused kernel keeps no such matrix.
    """

    hidden: float
    ffn: float
    keys: float
    rank: float
    attention: float
    ends: float


# (half precision, LoRA, fused attention) -> what a layer saves.
_SAVED = {
    (True, True, False): Saved(54, 12, 0, 14, 6, 6),
    (True, True, True): Saved(48, 12, 4, 14, 0, 6),
    (True, False, False): Saved(28, 8, 0, 0, 6, 10),
    (True, False, True): Saved(20, 8, 4, 0, 0, 10),
    (False, True, False): Saved(72, 20, 0, 28, 4, 6),
    (False, True, True): Saved(64, 20, 8, 28, 0, 6),
    (False, False, False): Saved(44, 16, 0, 0, 4, 14),
    (False, False, True): Saved(32, 16, 8, 0, 0, 14),
}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a checkpoint, in channels, tokens and weights.

    Attributes:
        keys: channels of keys, and of values.
        patches: image tokens.
        tower: weights of the vision tower.
        tower_hidden: channels of its features.
    """

    hidden: int
    layers: int
    heads: int
    keys: int
    ffn: int
    vocabulary: int
    patches: int = 576
    tower: int = 304_000_000
    tower_hidden: int = 1024

    @classmethod
    def of(cls, config: Mapping[str, Any], tower: Mapping[str, Any] | None = None) -> ModelSize:
        """The sizes in ``config.json``.

        Args:
            config: of the LLaVA checkpoint.
            tower: ``config.json`` of its vision tower; None: CLIP ViT-L/14-336.
        """
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        keys = hidden // heads * config.get("num_key_value_heads", heads)
        size = cls(hidden, config["num_hidden_layers"], heads, keys, config["intermediate_size"], config["vocab_size"])
        if tower is None:
            return size
        tower = tower.get("vision_config", tower)
        width, layers = tower["hidden_size"], tower["num_hidden_layers"]
        weights = layers * (4 * width**2 + 2 * width * tower["intermediate_size"])
        patches = (tower["image_size"] // tower["patch_size"]) ** 2
        return replace(size, patches=patches, tower=weights, tower_hidden=width)

    @property
    def language(self) -> int:
        """Weights of the language model."""
        linear = 2 * self.hidden**2 + 2 * self.hidden * self.keys + 3 * self.hidden * self.ffn
        return self.layers * linear + 2 * self.vocabulary * self.hidden

    @property
    def projector(self) -> int:
        """Weights of a two-layer projector."""
        return self.hidden * (self.tower_hidden + self.hidden)

    def adapter(self, rank: int) -> int:
        """Weights of a LoRA adapter on all seven products of each layer."""
        ends = 2 * (2 * self.hidden) + 2 * (self.hidden + self.keys) + 3 * (self.hidden + self.ffn)
        return self.layers * rank * ends


@dataclass(frozen=True)
class Work:
    """What one process of a stage holds at a time.

    Attributes:
        rank: of the adapter; 0: full fine-tuning.
        half: bf16 or fp16, else float32.
        checkpointing: activations are computed again in the backward pass.
        fused: attention by sdpa or flash-attn, else eager.
        rows: records (stage 2: questions) of a batch.
        text: tokens of question and answer; in stage 2 of the question.
        candidates, answer: K answers of so many tokens for each question; 0 in stage 1.
        logit_rows: rows of float32 logits at a time in stage 2.
        bits: of the frozen weights: 16 or 4.
    """

    rank: int
    half: bool
    checkpointing: bool
    fused: bool
    rows: int
    text: int = TEXT_TOKENS
    candidates: int = 0
    answer: int = 0
    logit_rows: int = 1024
    bits: int = 16


def stage_memory(size: ModelSize, work: Work) -> dict[str, float]:
    """What a stage needs on one GPU, part -> bytes. Stage 2 needs the larger of sampling and update, never both.

    Example:
        >>> from umed_plugin.commands.memory import ModelSize, Work, stage_memory
        >>> llava_med = ModelSize(hidden=4096, layers=32, heads=32, keys=1024, ffn=14336, vocabulary=32000)
        >>> work = Work(rank=128, half=True, checkpointing=True, fused=True, rows=8)
        >>> {part: round(need / 1e9, 1) for part, need in stage_memory(llava_med, work).items()}
        {'weights': 16.5, 'gradients and Adam': 4.3, 'activations': 4.0, 'logits': 2.4, 'reserve': 1.5}
    """
    width = 2 if work.half else 4
    frozen = _BYTES_OF_4_BITS if work.bits == 4 else width
    # Input embeddings are not quantized.
    embeddings = (width - frozen) * size.vocabulary * size.hidden
    trained = size.projector + (size.adapter(work.rank) if work.rank else size.language)
    # Full fine-tuning trains float32 weights, of which autocast keeps copies in half precision.
    language = size.language * frozen + embeddings if work.rank else size.language * (2 if work.half else 0)
    weights = size.tower * width + 4 * trained + language
    parts = {"weights": weights, "gradients and Adam": trained * float(_BYTES_OF_GRADIENT + _BYTES_OF_ADAM)}
    if work.candidates and not work.rank:
        parts["reference policy"] = float(size.language * width)
    prompt = size.patches + work.text
    length = prompt + work.candidates * work.answer
    update = {"activations": activations(size, work, length), "logits": _logits(size, work, length)}
    cache = 2 * size.layers * size.keys * width * work.rows * (prompt + work.candidates * work.answer)
    sampling = {"KV cache of sampling": float(cache)} if work.candidates else {}
    parts |= update if sum(update.values()) >= sum(sampling.values()) else sampling
    return {**parts, "reserve": RESERVE}


def activations(size: ModelSize, work: Work, length: int) -> float:
    """Bytes that autograd saves for rows of ``length`` tokens, logits apart."""
    saved = _SAVED[work.half, work.rank > 0, work.fused]
    tokens, width = work.rows * length, 2 if work.half else 4
    layer = tokens * (
        saved.hidden * size.hidden + saved.ffn * size.ffn + saved.keys * size.keys + saved.rank * work.rank
    )
    layer += saved.attention * work.rows * size.heads * length**2
    layer *= _SAVED_OVER_4_BITS if work.bits == 4 and work.half else 1
    ends = tokens * saved.ends * size.hidden
    if work.checkpointing:
        return ends + size.layers * tokens * width * size.hidden + layer
    return ends + size.layers * layer


def _logits(size: ModelSize, work: Work, length: int) -> float:
    """Logits, their logarithms and their gradient, in float32."""
    rows = min(work.logit_rows, work.rows * work.candidates * work.answer) if work.candidates else work.rows * length
    return 3.0 * 4 * rows * size.vocabulary


# What `umed upgrade` starts by default on a GPU (a test holds it against the settings).
DEFAULT_PLAN = {
    TUNING: Work(rank=128, half=True, checkpointing=True, fused=True, rows=8),
    REWARDING: Work(rank=128, half=True, checkpointing=True, fused=True, rows=4, candidates=8, answer=128),
}


def memory_lines(config: Mapping[str, Any], works: Mapping[str, Work], machine: Machine) -> list[str]:
    """For each stage, the memory that one GPU needs, whether it is there, and what to change where it is not.

    Args:
        config: ``config.json`` of the checkpoint.
        works: stage -> what one of its processes holds.
        machine: with the GPU; without one, the lines only name the need.
    """
    file = Path(str(config.get("mm_vision_tower", ""))) / "config.json"
    size = ModelSize.of(config, read_object(file) if file.is_file() else None)
    text = max(work.text for work in works.values())
    lines = [f"memory a GPU, for {size.patches} image tokens and {text} tokens of text:"]
    for number, (name, work) in enumerate(works.items(), start=1):
        lines.append(f"stage {number}, {name.replace('_', ' ')}: {summary(stage_memory(size, work))}")
        lines += [f"  {_verdict(size, work, machine.gpu_bytes)}"] if machine.gpus else []
    return lines


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


def has_fused_attention() -> bool:
    """Whether training would use an attention that keeps no matrix of all pairs of tokens."""
    # Libraries print about missing GPUs while they are imported.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from transformers import MistralForCausalLM

    return find_spec("flash_attn") is not None or bool(getattr(MistralForCausalLM, "_supports_sdpa", False))


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
            if after == current:
                continue
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
    rows = work.rows
    while rows > 1:
        rows //= 2
        yield f"batch_size: {rows} (and accumulation x {work.rows // rows})", {"rows": rows}
