"""A LLaVA checkpoint of about a million parameters, made from LLaVA's own classes, for the demo and the tests.

It has all parts of a real one: ``config.json`` with the ``mm_*`` keys, a sentencepiece tokenizer, half-precision weights, and a
CLIP vision tower in its own folder. The tower's weights are not inside the checkpoint (as in LLaVA-1.5).
``config.mm_vision_tower`` is the absolute path of ``PATH/vision_tower``, because LLaVA resolves a relative one against the
working folder. If you move the folder, edit that line of ``config.json``.

How to run: ``make_checkpoint(Path("somewhere/tiny-llava-mistral"), corpus=[...])``. Stock LLaVA chooses its loader by the
folder's name, so the last part of the path should contain ``llava``, and for that family ``mistral``.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UsageError, unknown_name

FAMILIES = ("mistral", "llama")
IMAGE_SIZE = 64
PATCH_SIZE = 8
TOWER_WIDTH = 96
TOWER_LAYERS = 2
CONTEXT = 1024
# A sentencepiece model with byte fallback uses 256 entries for bytes and 3 for special tokens.
VOCABULARY = 768

# torch's random numbers are the process's, and transformers' classes are imported at their first use, which two threads break.
_ONE_THREAD = threading.Lock()

DEFAULT_CORPUS = (
    "[INST] What abnormality can be seen in this image? Give its location as a box. [/INST] There is an abnormality.",
    "It is located at [0.12, 0.34, 0.56, 0.78]. The finding is a nodule. The image shows no abnormality.",
    "A chat between a curious human and an artificial intelligence assistant. USER: ASSISTANT: describe the lesion",
)


def make_checkpoint(
    path: Path | str,
    *,
    family: str = "mistral",
    seed: int = 0,
    hidden_size: int = 128,
    layers: int = 4,
    corpus: Sequence[str] = DEFAULT_CORPUS,
) -> Path:
    """Write a small checkpoint with random weights under ``path`` and return the absolute path. Threads do so in turns.

    Args:
        path: the folder to create; files of an earlier checkpoint in it are overwritten.
        family: ``mistral`` (``model_type: llava_mistral``, LLaVA-Med 1.5's) or ``llama`` (``llava_llama``, LLaVA-1.5's).
        seed: determines every weight.
        hidden_size: width of the language model, a multiple of 64.
        layers: its number of layers.
        corpus: texts to train the tokenizer. Their words become single tokens; everything else falls back to bytes.
    """
    if family not in FAMILIES:
        raise UsageError(unknown_name("checkpoint family", family, FAMILIES))
    import torch

    from umed_plugin.patches import prepare_llava

    prepare_llava()  # a benchmark that calls this has no command of ours before it
    path = Path(path).resolve()
    path.mkdir(parents=True, exist_ok=True)
    with _ONE_THREAD, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _make_tokenizer(path, corpus, legacy=family == "mistral")
        tower = write_tower(path / "vision_tower")
        model = _make_model(family, len(tokenizer), hidden_size, layers, tower)
        model.half().save_pretrained(path)
    return path


def train_sentencepiece(corpus: Sequence[str], vocabulary: int = VOCABULARY) -> bytes:
    """Return a Llama-style BPE model (UNK 0, BOS 1, EOS 2, no PAD; digits split, byte fallback) trained on ``corpus``."""
    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in corpus for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _make_tokenizer(path: Path, corpus: Sequence[str], legacy: bool) -> Any:
    # Every character of a prompt needs its own piece, or box digits would become bytes.
    alphabet = " ".join(chr(code) for code in range(33, 127))
    # LLaVA-Med 1.5 has a legacy tokenizer, LLaVA-1.5 a non-legacy one; LLaVA's masking treats them differently.
    return write_tokenizer(path, train_sentencepiece([*corpus, alphabet]), legacy=legacy)


def write_tokenizer(path: Path, model: bytes, *, legacy: bool, longest: int = CONTEXT) -> Any:
    """Write the files of a Llama tokenizer as in LLaVA's checkpoints, and load it.

    Written by hand, since the files that a library writes depend on its version.

    Args:
        path: an existing folder.
        model: a sentencepiece model with UNK 0, BOS 1, EOS 2.
        legacy: whether text after a special token begins with a space, as in LLaVA-Med 1.5.
        longest: ``model_max_length``.
    """
    from transformers import LlamaTokenizer

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    entries = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        **special,
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": token, **entries} for i, token in enumerate(special.values())},
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "model_max_length": longest,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (path / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return LlamaTokenizer.from_pretrained(path)


def write_tower(path: Path) -> Path:
    """Write the small vision tower with its image processor into a folder, and return the folder."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor, CLIPVisionModel
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=2 * TOWER_WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=TOWER_WIDTH,
    )
    tower = CLIPVisionModel(config)
    _give_filters(tower)
    _give_positions(tower)
    tower.half().save_pretrained(path)
    # (122, 116, 104)/255 is CLIP's own mean and also the color of the padding.
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(path)
    return path


def _give_filters(tower: Any) -> None:
    """Give the frozen tower filters for brightness, edges and texture, as a trained one has: cosine waves over each patch.

    With random filters the mean gray of a patch dominates, and learning to find a lesion takes several times longer.
    """
    import torch

    line = torch.arange(PATCH_SIZE) + 0.5
    waves = [torch.cos(math.pi * k * line / PATCH_SIZE) for k in range(PATCH_SIZE)]
    low_first = sorted((u + v, u, v) for u in range(PATCH_SIZE) for v in range(PATCH_SIZE))[: TOWER_WIDTH // 3]
    filters = torch.zeros(TOWER_WIDTH, 3, PATCH_SIZE, PATCH_SIZE)
    for index, (order, u, v) in enumerate(low_first):
        wave = waves[u][:, None] * waves[v][None, :]
        gain = 0.25 if order == 0 else 0.75 / (1 + 0.3 * order)
        filters[index] = gain * wave / wave.norm()
    mixing = torch.linalg.qr(torch.randn(TOWER_WIDTH, TOWER_WIDTH))[0]
    tower.vision_model.embeddings.patch_embedding.weight.data = torch.einsum("ij,jchw->ichw", mixing, filters)


def _give_positions(tower: Any) -> None:
    """Give the frozen tower position embeddings as a trained one has: waves over rows and over columns."""
    import torch

    grid = IMAGE_SIZE // PATCH_SIZE
    position = (torch.arange(grid) + 0.5) / grid
    waves = [torch.sin(position * math.pi * k + shift) for k in (0.5, 1, 2, 4) for shift in (0.0, math.pi / 2)]
    along = torch.stack(waves, dim=1)  # [grid, 8]
    rows = along[:, None, :].expand(grid, grid, -1)
    columns = along[None, :, :].expand(grid, grid, -1)
    code = torch.cat([rows, columns], dim=-1).reshape(grid * grid, -1)
    mixing = torch.randn(code.shape[1], TOWER_WIDTH) / code.shape[1] ** 0.5
    tower.vision_model.embeddings.position_embedding.weight.data[1:] = 0.3 * code @ mixing


def _make_model(family: str, vocabulary: int, hidden_size: int, layers: int, tower: Path) -> Any:
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.04,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    multimodal = vision_settings(tower)
    with contextlib.redirect_stdout(io.StringIO()):
        if family == "mistral":
            from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

            model = LlavaMistralForCausalLM(LlavaMistralConfig(**shape, sliding_window=None, **multimodal))
        else:
            from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

            model = LlavaLlamaForCausalLM(LlavaConfig(**shape, **multimodal))
    model.generation_config.pad_token_id = 0
    return model


def vision_settings(tower: Path) -> dict[str, Any]:
    """What ``config.json`` of a LLaVA checkpoint says about images, for a tower of `write_tower`."""
    return {
        "mm_vision_tower": str(tower),
        "mm_hidden_size": TOWER_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": CONTEXT,
    }
