"""An answer about a picture, and the attention of its words on the image.

The attention comes from a second forward pass over prompt and answer (`umed_plugin.model.attention`).
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from umed_plugin.commands.serve.box_places import Place
from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.terms import ClassNames, find_terms
from umed_plugin.model.attention import AttentionSettings, pass_with_attention
from umed_plugin.model.forward import Candidates, base_llava, embed_prompts
from umed_plugin.model.token_spans import decode_with_offsets, tokens_in_spans

SINK_RATIO = 20.0  # tau of arXiv 2503.03321
_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")


@dataclass(frozen=True)
class Answer:
    """An answer of the model, and what its attention maps are computed from.

    Attributes:
        text: the decoded answer, without special tokens and separator.
        boxes: xyxy in pixels of the picture, in the order of the text, clipped to it; None for a box that is malformed, leaves
            the square or lies in its padding.
        places: where the boxes stand in the text, and what could not be read as one, such as a box that is cut off.
        forgotten: number of earlier questions that did not fit into the context and were left out.
        cut: the number of tokens after which ``--max-new-tokens`` cut the answer off; None if the model ended it.
        prompt_ids: token ids [L] of the prompt, with the image token.
        token_ids: the generated token ids, including EOS if it was generated.
        features: image features [1, P, D].
        geometry: maps between the picture and the model's square.
    """

    text: str
    boxes: list[Optional[Box]]
    places: list[Place]
    forgotten: int
    cut: Optional[int]
    prompt_ids: Tensor
    token_ids: list[int]
    features: Tensor
    geometry: ImageGeometry


@torch.no_grad()
def attended_words(model: Any, tokenizer: Any, answer: Answer, sink_ratio: float = 0.0) -> dict[str, Any]:
    """The attention of each word of an answer on the image patches, averaged over layers and heads.

    Args:
        sink_ratio: leave out attention sinks, layer by layer, by this tau (`umed_plugin.model.attention`); 0: mask nothing.

    Returns:
        ``grid``: patches per side. ``place``: xyxy of the grid in pixels of the picture. ``sinks``: number of patches that
        are left out in at least one layer; None if none are to be. ``words``: a list of

        - ``text``: the word;
        - ``is_name``: whether it names an abnormality that a shipped recipe knows; these words come first;
        - ``map``: base64, one byte per patch, row by row, 255 for the largest;
        - ``peak``: the largest patch's share of the attention on the image, 0-1.
    """
    ids = [token for token in answer.token_ids if token != tokenizer.eos_token_id]
    text, ends = decode_with_offsets(tokenizer, ids)
    names = [(start, end) for start, end, _ in find_terms(text, shipped_terms())]
    words = [match.span() for match in _WORD.finditer(text)]
    spans = [*names, *(word for word in words if word not in names)]
    maps, sinks = _maps(model, answer, ids, sink_ratio) if spans else (None, 0)
    span = answer.geometry.patch_span
    return {
        "grid": answer.geometry.grid,
        "place": answer.geometry.from_square([(0.0, 0.0, span, span)])[0],
        "sinks": sinks if sink_ratio else None,
        "words": [
            {
                "text": text[slice(*span)],
                "is_name": span in names,
                **_encoded(maps[tokens_in_spans(ends, [span])].mean(0)),
            }
            for span in spans
            if maps is not None
        ],
    }


@functools.cache
def shipped_terms() -> ClassNames:
    """Abnormality -> names, merged from all shipped recipes; used to highlight the names in an answer."""
    from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes

    merged: dict[str, list[str]] = {}
    for name in shipped_recipes():
        for plain, words in load_recipe(name).names.items():
            known = merged.setdefault(plain, [])
            known += [word for word in words if word not in known]
    return merged


def _maps(model: Any, answer: Answer, ids: Sequence[int], sink_ratio: float) -> tuple[Tensor, int]:
    """Attention [T, P] of each token on the image patches, averaged over layers and heads, and the number of masked patches.

    Each row sums to 1.
    """
    prompts = embed_prompts(model, [answer.prompt_ids], answer.features)
    tokens = torch.tensor([list(ids)], device=prompts.mask.device)
    maps = torch.zeros(len(ids), prompts.n_patches, device=tokens.device)
    masked = torch.zeros(prompts.n_patches, dtype=torch.bool, device=tokens.device)
    layers = range(base_llava(model).config.num_hidden_layers)

    def add(_owners: Tensor, _queries: Tensor, attention: Tensor) -> None:
        maps.add_(attention.mean(dim=1))
        if sink_ratio:  # what is masked gets nothing from any token and head of this layer
            masked.logical_or_((attention == 0).all(dim=0).all(dim=0))

    candidates = Candidates(tokens, torch.ones_like(tokens))
    settings = AttentionSettings(layers, sink_ratio=sink_ratio)
    pass_with_attention(model, prompts, candidates, [range(len(ids))], settings, add)
    return maps / len(layers), int(masked.sum())


def _encoded(attention: Tensor) -> dict[str, Any]:
    peak = float(attention.max())
    values = (attention / peak * 255).round().to(torch.uint8).cpu().numpy()
    return {"map": base64.b64encode(values.tobytes()).decode(), "peak": round(peak, 6)}
