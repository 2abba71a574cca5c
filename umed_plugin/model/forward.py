"""Forward passes of a LLaVA model over prompts and answers, and the log-probabilities of answers.

A query is an image and a question; its K candidates share both. Per pass, the image is encoded once and the prompt is computed
once per query. `encode_images` and `embed_prompts` make the inputs, and `prefill` runs the prompts into a KV cache for sampling.
`answer_pass` is the teacher-forced pass over given answers: the policy, the old policy and the reference policy are all scored by
it, and the update takes its gradient through it. `answer_log_probs` makes log-probabilities from its logits.

Shapes: Q queries, K candidates each, N = Q*K rows in query-major order, L prompt positions (text and image patches, padded
left), T answer tokens (padded right), P image patches, H hidden size, V vocabulary. Masks: 1 is a token, 0 is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from umed_plugin.errors import UmedError
from umed_plugin.model.kv_cache import SharedPrefixCache
from umed_plugin.model.output_layer import Scoring, output_layer_scores, output_layer_sees, scored
from umed_plugin.model.packing import pack, row_mask
from umed_plugin.model.split_attention import attends_split

IMAGE_TOKEN_INDEX = -200  # llava.constants.IMAGE_TOKEN_INDEX: stands for the image in a tokenized prompt


@dataclass(frozen=True)
class PromptBatch:
    """Q embedded prompts, padded on the left so that every answer starts at position L.

    Attributes:
        embeds: [Q, L, H] input embeddings, with the image patches where the image token was.
        mask: [Q, L] 1 for a token or patch, 0 for padding.
        image_start: [Q] index in 0..L-1 of the first image patch. A class token, which some towers give, stands before it.
        n_patches: number of image patches, the same for all prompts.
    """

    embeds: Tensor
    mask: Tensor
    image_start: Tensor
    n_patches: int


@dataclass(frozen=True)
class Candidates:
    """N sampled answers.

    Attributes:
        token_ids: [N, T] answer tokens; padding holds the EOS id.
        mask: [N, T] 1 up to and including the first EOS, 0 after it.
    """

    token_ids: Tensor
    mask: Tensor

    def answers(self) -> list[list[int]]:
        """The token ids of each answer, without padding."""
        lengths = self.mask.sum(dim=1).tolist()
        return [ids[:length] for ids, length in zip(self.token_ids.tolist(), lengths)]


@dataclass(frozen=True)
class AnswerLogProbs:
    """Log-probabilities of N answers.

    Attributes:
        log_probs: [N, T] log-probability (nats, <= 0) of each answer token; 0 at padding.
        entropy: [N, T] entropy (nats, >= 0) of the distribution that predicts each answer token; 0 at padding.
    """

    log_probs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class AnswerPass:
    """Outputs of one teacher-forced pass over N answers, with its graph; arbitrary at padding.

    Attributes:
        logits: [N, T, V] float32 logits that predict each answer token; empty, [N, T, 0], under a `Scoring`.
        hidden: [N, T, H] float32 last hidden states (after the final norm) that the logits are made from. They belong to the
            position before each token: a value head sees all that came before the token, and not the token itself. Empty under
            a `Scoring` without them.
        scores: log-probabilities and entropy, under a `Scoring`.
    """

    logits: Tensor
    hidden: Tensor
    scores: AnswerLogProbs | None = None


def base_llava(model: Any) -> Any:
    """The LLaVA model inside a PEFT wrapper, or the model itself. The linear layers inside a wrapper carry the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def encode_images(model: Any, images: Tensor) -> Tensor:
    """Run the vision tower without gradient: [Q, 3, S, S] preprocessed pixels -> [Q, P, D] patch features."""
    tower = base_llava(model).get_vision_tower()
    with torch.no_grad():
        return tower(images.to(device=tower.device, dtype=tower.dtype))


def embed_prompts(model: Any, prompt_ids: Sequence[Tensor], image_features: Tensor) -> PromptBatch:
    """Project the image features and insert them into the embedded prompts, as LLaVA's own forward pass does.

    Args:
        model: a LLaVA model, with or without PEFT wrapper.
        prompt_ids: Q tensors of token ids, each with ``IMAGE_TOKEN_INDEX`` exactly once.
        image_features: [Q, P, D] from `encode_images`, or [Q, 1 + P, D] with the tower's class token first. The gradient reaches
            the projector.

    Raises:
        UmedError: a prompt has no image token, or more than one.
    """
    llava = base_llava(model)
    projector = llava.get_model().mm_projector
    patches = projector(image_features.to(next(projector.parameters()).dtype))
    embed_tokens = llava.get_input_embeddings()
    rows, starts = [], []
    for index, (ids, image) in enumerate(zip(prompt_ids, patches)):
        image_tokens = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        if len(image_tokens) != 1:
            raise UmedError(
                f"prompt {index} of the batch has {len(image_tokens)} image tokens; rewarding needs exactly one image per "
                "question. Put one '<image>' into the first human turn of each record."
            )
        start = image_tokens[0]
        text = embed_tokens(torch.cat([ids[:start], ids[start + 1 :]]).to(image.device))
        rows.append(torch.cat([text[:start], image.to(text.dtype), text[start:]]))
        starts.append(start)
    class_tokens = int(llava.get_vision_tower().select_feature == "cls_patch")
    length = max(row.shape[0] for row in rows)
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, length - row.shape[0], 0)) for row in rows])
    mask = torch.stack([_left_mask(length, row.shape[0], row.device) for row in rows])
    image_start = torch.tensor(
        [length - row.shape[0] + start + class_tokens for row, start in zip(rows, starts)], device=embeds.device
    )
    return PromptBatch(embeds, mask, image_start, patches.shape[1] - class_tokens)


def _left_mask(length: int, tokens: int, device: torch.device) -> Tensor:
    return (torch.arange(length, device=device) >= length - tokens).long()


def positions(mask: Tensor) -> Tensor:
    """Position ids of the tokens in ``mask``: 0 at the first token of each row, and 0 at padding before it."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def prefill(model: Any, prompts: PromptBatch, cache: DynamicCache) -> AnswerPass:
    """Run the prompts into the KV cache; returns the first answer token's logits and hidden state (N = Q, T = 1).

    Columns that the cache already holds are not computed again. They must be those of the same prompts.
    """
    computed = cache.get_seq_length()
    inputs = {
        "inputs_embeds": prompts.embeds[:, computed:],
        "attention_mask": prompts.mask,
        "position_ids": positions(prompts.mask)[:, computed:],
    }
    with output_layer_sees(unwrapped(model), lambda hidden: hidden[:, -1:]) as hidden:
        logits = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits
    return AnswerPass(logits, hidden[0])


def answer_pass(
    model: Any, prompts: PromptBatch, candidates: Candidates, *, packed: bool = False, scoring: Scoring | None = None
) -> AnswerPass:
    """Teacher-forced pass: the logits that predict each answer token, and the hidden states that they are made from.

    There are three ways to compute it, with equal results:

    - packed: the K answers of a query stand behind their prompt in one row (see `uses_packed_pass`);
    - shared prefix: they read the prompt's KV cache, through which the gradient flows back;
    - repeated: the prompt is repeated for each answer. Gradient checkpointing keeps no KV cache, so this is what is left for it
      if the attention takes no block mask.

    Args:
        model: anything with the forward pass of a causal language model (a DDP or DeepSpeed wrapper too).
        prompts: Q prompts.
        candidates: N = Q*K answers.
        packed: whether the model takes block masks: it has no `umed_plugin.model.packing.packing_fault`.
        scoring: turn the logits into log-probabilities in the output layer, and do not keep them.
    """
    llava = unwrapped(model)
    if uses_packed_pass(llava, packed):
        return _packed_pass(model, prompts, candidates, scoring)
    if _keeps_no_cache(llava):
        return _repeated_pass(model, prompts, candidates, scoring)
    return _shared_prefix_pass(model, prompts, candidates, scoring)


def uses_packed_pass(llava: Any, packed: bool) -> bool:
    """Whether `answer_pass` puts the answers of a query into one row.

    A row has no padding between answers. Without split attention, its whole square is computed, most of which is masked. Then
    reading the prompt's KV cache is cheaper where a cache can be kept. Must not depend on the answers: ranks that call the model
    a different number of times would deadlock.
    """
    return packed and (_keeps_no_cache(llava) or attends_split(llava))


def _keeps_no_cache(llava: Any) -> bool:
    """Under gradient checkpointing transformers switches ``use_cache`` off."""
    return llava.training and llava.is_gradient_checkpointing


def _packed_pass(model: Any, prompts: PromptBatch, candidates: Candidates, scoring: Scoring | None) -> AnswerPass:
    llava = unwrapped(model)
    rows = pack(prompts.mask, candidates.mask)
    answers = llava.get_input_embeddings()(rows.put(candidates.token_ids, candidates.mask))
    embeds = torch.cat([prompts.embeds, answers], dim=1)
    mask = row_mask(llava, rows.columns, embeds.dtype)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": rows.columns.positions}
    scores = output_layer_scores(llava, candidates.token_ids, scoring)
    with output_layer_sees(llava, lambda hidden: hidden[rows.row, rows.before]) as hidden, scores:
        output = model(**inputs, use_cache=False, return_dict=True).logits
    return _outputs(output.float(), hidden[0], candidates, scoring)


def _repeated_pass(model: Any, prompts: PromptBatch, candidates: Candidates, scoring: Scoring | None) -> AnswerPass:
    llava = unwrapped(model)
    # The last prompt position predicts the first answer token, and the last answer token predicts nothing that is needed.
    start = prompts.mask.shape[1] - 1
    scores = output_layer_scores(llava, candidates.token_ids, scoring)
    with output_layer_sees(llava, lambda hidden: hidden[:, start:-1]) as hidden, scores:
        output = model(**repeated_inputs(llava, prompts, candidates), use_cache=False, return_dict=True).logits
    return _outputs(output.float(), hidden[0], candidates, scoring)


def _shared_prefix_pass(
    model: Any, prompts: PromptBatch, candidates: Candidates, scoring: Scoring | None
) -> AnswerPass:
    llava = unwrapped(model)
    cache = SharedPrefixCache()
    first = prefill(model, prompts, cache)
    rows = query_of_row(prompts, candidates)
    # Mistral under flash attention refuses a KV cache with rows that end in padding: append a token, without its logits.
    token_ids = torch.nn.functional.pad(candidates.token_ids, (0, 1))
    mask = torch.cat([prompts.mask[rows], candidates.mask, candidates.mask.new_ones(len(rows), 1)], dim=1)
    inputs = {
        "inputs_embeds": llava.get_input_embeddings()(token_ids),
        "attention_mask": mask,
        "position_ids": positions(mask)[:, prompts.mask.shape[1] :],
    }
    scores = output_layer_scores(llava, candidates.token_ids[:, 1:], scoring)
    with output_layer_sees(llava, lambda hidden: hidden[:, :-2]) as hidden, scores:
        output = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits
    # The prompt's pass predicts first tokens, once per query; its copies for the K answers share one gradient.
    first_output = first.logits[rows].float()
    if scoring is not None:
        first_output = scored(first_output, candidates.token_ids[:, :1], scoring)
    output, states = torch.cat([first_output, output.float()], dim=1), torch.cat([first.hidden[rows], hidden[0]], dim=1)
    return _outputs(output, states, candidates, scoring)


def _outputs(output: Tensor, hidden: Tensor, candidates: Candidates, scoring: Scoring | None) -> AnswerPass:
    """An `AnswerPass` from the output layer's output, [N, T, V] logits or [N, T, 2] scores, and its input [N, T, H]."""
    if scoring is None:
        return AnswerPass(output, hidden.float())
    log_probs, entropy = (output * candidates.mask[..., None].to(output.dtype)).unbind(dim=-1)
    states = hidden.float() if scoring.hidden else hidden[..., :0].detach()
    return AnswerPass(output[..., :0].detach(), states, AnswerLogProbs(log_probs, entropy))


def unwrapped(model: Any) -> Any:
    """The LLaVA model inside adapters and inside a DDP or DeepSpeed wrapper."""
    return base_llava(getattr(model, "module", model))


def query_of_row(prompts: PromptBatch, candidates: Candidates) -> Tensor:
    """[N] index of the query that each candidate answers."""
    queries = torch.arange(len(prompts.mask), device=prompts.mask.device)
    return queries.repeat_interleave(len(candidates.mask) // len(prompts.mask))


def repeated_inputs(llava: Any, prompts: PromptBatch, candidates: Candidates) -> dict[str, Tensor]:
    """Inputs of a pass over N rows of prompt (padded left) and answer (padded right): [N, L+T]."""
    rows = query_of_row(prompts, candidates)
    embeds = torch.cat([prompts.embeds[rows], llava.get_input_embeddings()(candidates.token_ids)], dim=1)
    mask = torch.cat([prompts.mask[rows], candidates.mask], dim=1)
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions(mask)}


def answer_log_probs(
    logits: Tensor, candidates: Candidates, *, temperature: float = 1.0, entropy_gradient: bool = False
) -> AnswerLogProbs:
    """Log-probabilities of the candidates' tokens, from the logits that predict them.

    Args:
        logits: [N, T, V] from `answer_pass`.
        candidates: N answers.
        temperature: of sampling; the logits are divided by it (0 counts as 1).
        entropy_gradient: keep the graph of the entropy, for an entropy bonus.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    log_probs = logits.log_softmax(dim=-1)
    mask = candidates.mask.to(logits.dtype)
    chosen = log_probs.gather(-1, candidates.token_ids[..., None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        # One answer at a time: the intermediate tensors are as large as its logits.
        entropy = torch.stack([-(answer.exp() * answer).sum(dim=-1) for answer in log_probs])
    return AnswerLogProbs(chosen * mask, entropy * mask)


def decode_answers(tokenizer: Any, candidates: Candidates) -> list[str]:
    """The N answers as text, without special tokens and padding."""
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in candidates.answers()]
