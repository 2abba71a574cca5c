"""Questions about one image share what stands before them: the image's features, and the KV cache of all up to the image.

A prompt is system text, image, question. With LLaVA's 576 patches and a question of 20 tokens, all but these 20 are the same for
every question about the image. They are computed once per image, and each question reads them from the KV cache. Answers equal
those of one prompt at a time, up to rounding.

Shapes as in `umed_plugin.model.forward`; B images, Q questions about them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umed_plugin.errors import UmedError
from umed_plugin.model.forward import (
    IMAGE_TOKEN_INDEX,
    Candidates,
    PromptBatch,
    answer_log_probs,
    answer_pass,
    embed_prompts,
    positions,
    prefill,
    unwrapped,
)
from umed_plugin.model.kv_cache import PreallocatedCache
from umed_plugin.model.sampling import NotFiniteError, SamplingSettings, continue_prompts


@dataclass(frozen=True)
class Continuation:
    """Text behind a prompt, whose likelihood is wanted.

    Attributes:
        image: index of the prompt's image.
        prompt_ids: [L] token ids, with the image token once.
        full_ids: [L+T] the same, followed by the text; its last T tokens are the text.
    """

    image: int
    prompt_ids: Tensor
    full_ids: Tensor

    @property
    def text_tokens(self) -> int:
        """T, the number of tokens of the text."""
        return len(self.full_ids) - len(self.prompt_ids)


def answer_greedily(
    model: Any, features: Tensor, images: Sequence[int], prompt_ids: Sequence[Tensor], max_new_tokens: int, eos: int
) -> Candidates:
    """Greedy answers to Q questions about B images.

    Args:
        model: in evaluation mode.
        features: [B, patches, D] from `umed_plugin.model.forward.encode_images`.
        images: [Q] index of each question's image; questions about one image need not be adjacent.
        prompt_ids: Q tensors of token ids, each with the image token once and the same tokens before it.
        max_new_tokens: longest answer.
        eos: token that ends an answer.

    Raises:
        UmedError: the prompts differ before the image.
    """
    llava = unwrapped(model)
    prefix, suffixes = split_at_image(prompt_ids)
    device = features.device
    longest = max(map(len, suffixes))
    cache = PreallocatedCache(longest + max_new_tokens)
    with torch.no_grad():
        # One row per image, then one row per question: its image's keys and values, and behind them its own tokens.
        prompts = embed_prompts(model, [prefix.to(device)] * len(features), features)
        prefill(model, prompts, cache)
        cache.take_rows(torch.tensor(images, device=device))
        # Padding stands between image and question, so that all questions end in the same column.
        ids, suffix_mask = _padded_left(suffixes, longest, device)
        mask = torch.cat([prompts.mask[:1].expand(len(suffixes), -1), suffix_mask], dim=1)
        inputs = {
            "inputs_embeds": llava.get_input_embeddings()(ids),
            "attention_mask": mask,
            "position_ids": positions(mask)[:, -longest:],
        }
        logits = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits[:, -1]
        settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=eos)
        return continue_prompts(model, cache, logits, mask, settings)


def continuation_losses(model: Any, features: Tensor, continuations: Sequence[Continuation]) -> list[float]:
    """Mean cross-entropy (nats) of each continuation's own tokens, given its prompt.

    Args:
        model: in evaluation mode.
        features: [B, patches, D] from `umed_plugin.model.forward.encode_images`.
        continuations: their prompts have the same tokens before the image.

    Raises:
        NotFiniteError: one is NaN.
    """
    prefix, suffixes = split_at_image([continuation.full_ids for continuation in continuations])
    # The prefix up to the image is the prompt; question and text behind it are scored as its answer. Each image gets the same
    # number of rows, as candidates do.
    used = sorted({continuation.image for continuation in continuations})
    features = features[used]
    rows = _rows_of_images([used.index(continuation.image) for continuation in continuations], len(used))
    device = features.device
    longest = max(map(len, suffixes))
    ids = torch.zeros(len(features) * len(rows[0]), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    row_of: dict[int, int] = {}
    for row, index in enumerate(index for indices in rows for index in indices):
        ids[row, : len(suffixes[index])] = suffixes[index].to(device)
        mask[row, : len(suffixes[index])] = 1
        row_of[index] = row
    with torch.no_grad():
        prompts: PromptBatch = embed_prompts(model, [prefix.to(device)] * len(features), features)
        candidates = Candidates(ids, mask)
        log_probs = answer_log_probs(answer_pass(model, prompts, candidates).logits, candidates).log_probs
    losses = []
    for index, continuation in enumerate(continuations):
        end = len(suffixes[index])
        losses.append(float(-log_probs[row_of[index], end - continuation.text_tokens : end].mean()))
    if any(map(math.isnan, losses)):  # a loss may be infinite
        raise NotFiniteError("the likelihood of an option is NaN")
    return losses


def split_at_image(prompt_ids: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The tokens up to and including the image, which all prompts share, and the tokens after it in each prompt.

    Raises:
        UmedError: a prompt has no image token or more than one, ends with it, or differs from the others before it.
    """
    prefix, suffixes = None, []
    for index, ids in enumerate(prompt_ids):
        image_tokens = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        if len(image_tokens) != 1 or image_tokens[0] == len(ids) - 1:
            raise UmedError(
                f"prompt {index} of the batch has {len(image_tokens)} image tokens and {len(ids)} tokens in all. It needs one "
                "image token, and a question after it. Questions must not contain '<image>'."
            )
        before, behind = ids[: image_tokens[0] + 1], ids[image_tokens[0] + 1 :]
        prefix = before if prefix is None else prefix
        if not torch.equal(before, prefix):
            raise UmedError(
                f"prompt {index} of the batch differs from the first one before the image: they share no prefix."
            )
        suffixes.append(behind)
    if prefix is None:
        raise UmedError("there are no prompts to answer")
    return prefix, suffixes


def _padded_left(rows: Sequence[Tensor], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [Q, length] and their mask."""
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row.to(device)
        mask[index, length - len(row) :] = 1
    return ids, mask


def _rows_of_images(images: Sequence[int], count: int) -> list[list[int]]:
    """For each image (none is without rows) the indices of its rows; a shorter list repeats its last, computed in vain."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for index, image in enumerate(images):
        rows[image].append(index)
    longest = max(map(len, rows))
    return [row + row[-1:] * (longest - len(row)) for row in rows]
