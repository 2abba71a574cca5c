"""Questions about one image share what stands before them: the image's features, and keys and values of all up to the image.

A prompt is system text, image, question. With LLaVA's 576 patches and a question of 20 tokens all but these 20 are the same for
every question about the image: they are computed once for each image, and each question reads them from the cache. Answers are
those of one prompt at a time, up to rounding.

Shapes as in `umed_plugin.model.forward`; B images, each with some of the Q questions, P tokens up to and with the image.
"""

from __future__ import annotations

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
from umed_plugin.model.kv_cache import RoomyCache
from umed_plugin.model.sampling import continue_prompts


@dataclass(frozen=True)
class Continuation:
    """Text behind a prompt whose likelihood is asked for.

    Attributes:
        image: index of the prompt's image.
        prompt_ids: [L] token ids, with the image token once.
        full_ids: [L+T] the same with the text behind it; its last T tokens are the text.
    """

    image: int
    prompt_ids: Tensor
    full_ids: Tensor

    @property
    def asked(self) -> int:
        """T, the number of tokens whose likelihood is asked for."""
        return len(self.full_ids) - len(self.prompt_ids)


def answer_greedily(
    model: Any, features: Tensor, images: Sequence[int], prompt_ids: Sequence[Tensor], max_new_tokens: int, eos: int
) -> Candidates:
    """Greedy answers to Q questions about B images.

    Args:
        model: in evaluation mode.
        features: [B, patches, D] from `rollout.encode_images`.
        images: [Q] index of each question's image; questions about one image need not stand together.
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
    cache = RoomyCache(longest + max_new_tokens)
    with torch.no_grad():
        prompts = embed_prompts(model, [prefix.to(device)] * len(features), features)
        prefill(model, prompts, cache)
        cache.take_rows(torch.tensor(images, device=device))
        ids, suffix_mask = _padded_left(suffixes, longest, device)
        mask = torch.cat([prompts.mask[:1].expand(len(suffixes), -1), suffix_mask], dim=1)
        inputs = {
            "inputs_embeds": llava.get_input_embeddings()(ids),
            "attention_mask": mask,
            "position_ids": positions(mask)[:, -longest:],
        }
        logits = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits[:, -1]
        return continue_prompts(
            model, cache, logits, mask, max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=eos
        )


def continuation_losses(model: Any, features: Tensor, asked: Sequence[Continuation]) -> list[float]:
    """Mean cross-entropy (nats) of each continuation's own tokens, behind its prompt.

    Args:
        model: in evaluation mode.
        features: [B, patches, D] from `rollout.encode_images`.
        asked: their prompts have the same tokens before the image.
    """
    prefix, suffixes = split_at_image([one.full_ids for one in asked])
    used = sorted({one.image for one in asked})
    features = features[used]
    rows = _rows_of_images([used.index(one.image) for one in asked], len(used))
    device = features.device
    longest = max(map(len, suffixes))
    ids = torch.zeros(len(features) * len(rows[0]), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    place_of: dict[int, int] = {}
    for place, index in enumerate(index for row in rows for index in row):
        ids[place, : len(suffixes[index])] = suffixes[index].to(device)
        mask[place, : len(suffixes[index])] = 1
        place_of[index] = place
    with torch.no_grad():
        prompts: PromptBatch = embed_prompts(model, [prefix.to(device)] * len(features), features)
        candidates = Candidates(ids, mask)
        log_probs = answer_log_probs(answer_pass(model, prompts, candidates).logits, candidates).log_probs
    losses = []
    for index, one in enumerate(asked):
        end = len(suffixes[index])
        losses.append(float(-log_probs[place_of[index], end - one.asked : end].mean()))
    return losses


def split_at_image(prompt_ids: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The tokens up to and with the image, which all prompts share, and what follows in each.

    Raises:
        UmedError: a prompt has no image token or several, ends with it, or differs from the others before it.
    """
    prefix, suffixes = None, []
    for index, ids in enumerate(prompt_ids):
        places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        if len(places) != 1 or places[0] == len(ids) - 1:
            raise UmedError(
                f"prompt {index} of the batch has {len(places)} image tokens and {len(ids)} tokens in all; needed: one image "
                "token, and a question behind it. Questions must not hold '<image>'."
            )
        before, behind = ids[: places[0] + 1], ids[places[0] + 1 :]
        prefix = before if prefix is None else prefix
        if not torch.equal(before, prefix):
            raise UmedError(
                f"prompt {index} of the batch differs from the first before the image: they share no prefix."
            )
        suffixes.append(behind)
    if prefix is None:
        raise UmedError("there are no prompts to answer")
    return prefix, suffixes


def _padded_left(rows: Sequence[Tensor], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [Q, length] and their mask."""
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, length - len(row) :] = row.to(device)
        mask[place, length - len(row) :] = 1
    return ids, mask


def _rows_of_images(images: Sequence[int], count: int) -> list[list[int]]:
    """For each image, none of which is without rows, their indices; a shorter list repeats its last, computed in vain."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for index, image in enumerate(images):
        rows[image].append(index)
    longest = max(map(len, rows))
    return [row + row[-1:] * (longest - len(row)) for row in rows]
