"""Will it fit? The memory of one GPU that each stage of a plan needs, estimated from sizes alone.

Weights, gradients and Adam's averages are counted exactly. Activations are the tensors that autograd saves for the backward pass.
Their bytes per token were counted with ``torch.autograd.graph.saved_tensors_hooks``, under torch 2.0.1 with transformers 4.36
and under torch 2.13 with transformers 5.23. The two differ by up to 8 %, and the estimate takes their mean. With gradient
checkpointing, each layer keeps its input, and one layer at a time is computed again.

Not counted are the CUDA context, kernels' workspaces and fragmentation: `RESERVE` stands for them. DeepSpeed's configuration
is not read: with it, the estimate is that of a run without. What further losses of stage 1 add is in
`umed_plugin.commands.memory_extras`, what is said of a plan in `umed_plugin.commands.memory_advice`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from umed_plugin.commands import memory_extras
from umed_plugin.commands.machine import Machine
from umed_plugin.commands.memory_extras import Extras, Tower

RESERVE = 1.5e9
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
        tower: the vision tower.
    """

    hidden: int
    layers: int
    heads: int
    keys: int
    ffn: int
    vocabulary: int
    patches: int = 576
    tower: Tower = field(default_factory=Tower)

    @classmethod
    def of(cls, config: Mapping[str, Any], tower: Mapping[str, int] | None = None) -> ModelSize:
        """The sizes in ``config.json``.

        Args:
            config: of the LLaVA checkpoint.
            tower: sizes of its vision tower (`umed_plugin.checkpoints.tower_config`); None: CLIP ViT-L/14-336.
        """
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        keys = hidden // heads * config.get("num_key_value_heads", heads)
        size = cls(hidden, config["num_hidden_layers"], heads, keys, config["intermediate_size"], config["vocab_size"])
        if tower is None:
            return size
        layers, patches = tower["num_hidden_layers"], (tower["image_size"] // tower["patch_size"]) ** 2
        used = range(layers + 1)[config.get("mm_vision_select_layer", -2)]
        own = Tower(
            tower["hidden_size"], layers, used, tower["num_attention_heads"], tower["intermediate_size"], patches + 1
        )
        return replace(size, patches=patches, tower=own)

    @property
    def language(self) -> int:
        """Weights of the language model."""
        linear = 2 * self.hidden**2 + 2 * self.hidden * self.keys + 3 * self.hidden * self.ffn
        return self.layers * linear + 2 * self.vocabulary * self.hidden

    @property
    def projector(self) -> int:
        """Weights of a two-layer projector."""
        return self.hidden * (self.tower.hidden + self.hidden)

    @property
    def weights(self) -> int:
        """Of the whole checkpoint."""
        return self.language + self.projector + self.tower.weights

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
        sampled: questions whose answers are sampled at a time; 0 in stage 1.
        ddp: gradients are averaged by DistributedDataParallel, which keeps a second copy of them.
        text: tokens of question and answer; in stage 2 of the question.
        candidates, answer: K answers of so many tokens for each question; 0 in stage 1.
        logit_rows: rows of float32 logits at a time in stage 2, and in the KL of stage 1; 0: all.
        bits: of the frozen weights: 16 or 4.
        extras: further losses of stage 1.
        fused_tower: as ``fused``, of the vision tower and its teacher.
        older: the first form of sdpa in transformers: it repeats keys and values for grouped heads.
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
    sampled: int = 0
    ddp: bool = False
    extras: Extras = field(default_factory=Extras)
    fused_tower: bool = True
    older: bool = False


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
    tower = size.tower.trained if work.extras.tower else 0
    trained = size.projector + (size.adapter(work.rank) if work.rank else size.language) + tower
    # What is trained outside of an adapter has float32 weights, of which autocast keeps copies in half precision.
    copies = 2 if work.half else 0
    language = size.language * frozen + embeddings if work.rank else size.language * copies
    weights = (size.tower.weights - tower) * width + tower * copies + 4 * trained + language
    gradients = _BYTES_OF_GRADIENT * (2 if work.ddp else 1)
    parts = {"weights": weights, "gradients and Adam": trained * float(gradients + _BYTES_OF_ADAM)}
    if work.candidates and not work.rank:
        parts["reference policy"] = float(size.language * width)
    parts |= _teachers(size, work, trained)
    prompt = size.patches + work.text
    length = prompt + work.candidates * work.answer
    update = {"activations": activations(size, work, length), "logits": _logits(size, work, length)}
    update |= _of_extras(size, work)
    others = {}
    if work.candidates:
        others = {"KV cache of sampling": kv_cache(size, width, work.sampled or work.rows, length)}
        if not work.half and work.rank:  # the adapter is added to a second copy of the float32 weights
            others["weights with the adapter"] = float(size.language * width)
    if work.extras.encoder is not None:
        need = memory_extras.encoder_pass(work.extras.encoder, work.rows, half=work.half, fused=work.fused_tower)
        others = {"pass of the tower's teacher": need}
    parts |= update if sum(update.values()) >= sum(others.values()) else others
    return {**parts, "reserve": RESERVE}


def kv_cache(size: ModelSize, width: int, rows: int, length: int) -> float:
    """Bytes of the keys and values of rows of ``length`` tokens, in values of ``width`` bytes."""
    return float(2 * size.layers * size.keys * width * rows * length)


def _teachers(size: ModelSize, work: Work, trained: int) -> dict[str, float]:
    """Weights that only further losses need."""
    extras, parts = work.extras, {}
    if extras.teacher:
        parts["teacher"] = float(extras.teacher * (2 if work.half else 4))
    elif extras.keeps:
        # With its adapter switched off, the model itself is the start, but for what is trained outside of the adapter.
        parts["copy of the start"] = 4.0 * (trained - (size.adapter(work.rank) if work.rank else 0))
    if extras.encoder is not None:
        parts["tower's teacher"] = 4.0 * extras.encoder.weights
    return parts


def _of_extras(size: ModelSize, work: Work) -> dict[str, float]:
    """What further losses keep until the backward pass. All of a record's text counts as its answer."""
    extras, parts = work.extras, {}
    if extras.keeps:
        parts["KL"] = memory_extras.kl_bytes(work.rows * work.text, size.vocabulary, work.logit_rows)
    if extras.tower:
        parts["activations of the tower"] = memory_extras.tower_activations(
            size.tower, work.rows, half=work.half, checkpointing=work.checkpointing, fused=work.fused_tower
        )
    if extras.encoder is not None:
        parts["loss of the tower's teacher"] = memory_extras.feature_loss(size.tower, work.rows, extras.encoder)
    return parts


def activations(size: ModelSize, work: Work, length: int) -> float:
    """Bytes that autograd saves for rows of ``length`` tokens, logits apart."""
    saved = _SAVED[work.half, work.rank > 0, work.fused]
    if work.fused and work.older:
        # Counted too: each of a layer's two norms, and the last one, keeps a float32 tensor more.
        saved = replace(saved, hidden=saved.hidden + 8 + saved.keys, keys=0, ends=saved.ends + 4)
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
    answers = work.rows * work.candidates * work.answer
    rows = min(work.logit_rows or answers, answers) if work.candidates else work.rows * length
    return 3.0 * 4 * rows * size.vocabulary


def on_this_stack(work: Work, machine: Machine) -> Work:
    """The work with the attention that the installed libraries would use on the machine. flash-attn needs Ampere."""
    flash = machine.bf16 and find_spec("flash_attn") is not None
    fused = flash or _has("MistralForCausalLM._supports_sdpa")
    return replace(work, fused=fused, fused_tower=has_fused_tower(), older=has_older_sdpa())


def has_fused_tower() -> bool:
    """Whether vision tower and its teacher have an attention without a matrix of all pairs: later than language models."""
    return _has("CLIPVisionModel._supports_sdpa")


def has_older_sdpa() -> bool:
    """Whether the installed transformers has the first form of sdpa, a class of attention for each kind of model."""
    return _has("models.mistral.modeling_mistral.MistralSdpaAttention")


def _has(path: str) -> bool:
    """Whether an attribute below transformers exists and is true."""
    # Libraries print about missing GPUs while they are imported.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        import transformers

        found: Any = transformers
        for name in path.split("."):
            found = getattr(found, name, None)
    return bool(found)
