"""The queries of a rollout, and K sampled answers to each: the first step of `umed_plugin.training.experience_maker`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.model.attention import AttentionSettings
from umed_plugin.model.forward import Candidates, base_llava, embed_prompts, encode_images
from umed_plugin.model.patch_attention import rope_inverse_frequencies
from umed_plugin.model.sampled_attention import generate_with_attention
from umed_plugin.model.sampling import SamplingSettings
from umed_plugin.model.token_spans import lesion_naming_tokens
from umed_plugin.training.experience import stacked
from umed_plugin.training.out_of_memory import remedy_for_memory, sampling_remedy
from umed_plugin.training.rollout_engine import RolloutEngine
from umed_plugin.training.step_metrics import StepMetrics


@dataclass(frozen=True)
class Queries:
    """Q queries: prompts, [Q, P, D] features of their images, and records."""

    prompt_ids: list[Tensor]
    features: Tensor
    records: list[Record]

    def part(self, first: int, count: int) -> Queries:
        picked = slice(first, first + count)
        return Queries(self.prompt_ids[picked], self.features[picked], self.records[picked])


class Lesions:
    """Where vision relevance looks: the tokens of an answer that name a lesion, and the patches that the true boxes cover.

    Args:
        model: of the run, for its shapes.
        tokenizer: of the model.
        flags: of the run.
    """

    def __init__(self, model: Any, tokenizer: Any, flags: UmedFlags) -> None:
        llava = base_llava(model)
        tower = llava.get_vision_tower().config
        self._tokenizer, self._each = tokenizer, flags.umed_num_candidates
        self._image_size, self._patch_size = tower.image_size, tower.patch_size
        self.settings = AttentionSettings(
            flags.vrr_layer_indices(llava.config.num_hidden_layers),
            flags.vrr_head_indices(llava.config.num_attention_heads),
            flags.vrr_sink_ratio(llava.config.hidden_size),
        )
        if "vision_relevance" in flags.reward_names():
            rope_inverse_frequencies(
                llava.config, 2, torch.device("cpu")
            )  # refuses what cannot be measured at the start

    def naming_tokens(self, candidates: Candidates, records: Sequence[Record]) -> list[list[int]]:
        """For each of N candidates the indices of its tokens that name a lesion."""
        repeated = [record for record in records for _ in range(self._each)]
        return lesion_naming_tokens(self._tokenizer, candidates, repeated)

    def cover(self, records: Sequence[Record]) -> Tensor:
        """[Q, P] part of each patch that the true boxes cover."""
        covers = [self.geometry(record).patch_cover(true_boxes(record)) for record in records]
        return torch.stack([torch.from_numpy(cover) for cover in covers])

    def geometry(self, record: Record) -> ImageGeometry:
        """Where a record's image lies in the square that the vision tower sees."""
        return record_geometry(record, self._image_size, self._patch_size)


@dataclass
class CandidateSampling:
    """Samples the answers of a rollout.

    Attributes:
        flags: of the run.
        args: LLaVA's training arguments.
        settings: of sampling.
        engine: who samples.
        lesions: where vision relevance looks.
        measures_attention: whether vision relevance is read from sampling's KV cache.
        feature_cache: features of the frozen vision tower, or None.
        metrics: collects what is logged.
    """

    flags: UmedFlags
    args: Any
    settings: SamplingSettings
    engine: RolloutEngine
    lesions: Lesions
    measures_attention: bool
    feature_cache: Any
    metrics: StepMetrics

    def queries(self, policy: Any, batches: Sequence[dict[str, Any]]) -> Queries:
        """The queries of all batches; their images are encoded batch by batch."""
        return Queries(
            [ids for batch in batches for ids in batch["prompt_ids"]],
            torch.cat([self.encode(policy, batch) for batch in batches]),
            [record for batch in batches for record in batch["records"]],
        )

    def encode(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        """[Q, P, D] patch features of the queries' images, from the feature cache where it has them."""
        cached = inputs["features"]
        if self.feature_cache is None:
            # The tower's output has another memory layout than features read from a cache, and bf16 kernels round by layout.
            return encode_images(policy, inputs["images"]).contiguous()
        hits = sum(features is not None for features in cached) / len(cached)
        self.metrics.add({"feature_cache_hits": hits}, len(cached))
        names = inputs["features_names"]
        return self.feature_cache.complete(cached, names, lambda: encode_images(policy, inputs["images"]))

    def sample(self, policy: Any, queries: Queries) -> tuple[Candidates, list[float], Tensor | None]:
        """K answers to each query, for as many queries at a time as may be sampled together.

        With them come N shares of attention on the lesion if no pass of the policy is needed for anything else; else none. Last,
        their log-probabilities [N, T] if a server has sampled them.
        """
        parts, attention, log_probs = [], [], []
        together = self.flags.umed_sampling_batch_size
        together = together or self.args.train_batch_size * self.args.gradient_accumulation_steps
        for first in range(0, len(queries.records), together):
            part = queries.part(first, together)
            count = len(part.records)
            remedy = sampling_remedy(self.flags, count)
            doing = f"sampling {self.flags.umed_num_candidates} answers to each of {count} questions"
            with remedy_for_memory(doing, remedy):
                sampled, shares, of_server = self._sample_part(policy, part)
            parts.append(sampled)
            attention += shares
            log_probs.append(of_server)
        longest = max(part.mask.shape[1] for part in parts)
        ends = self.settings.eos_token_id
        candidates = Candidates(
            torch.cat([pad(part.token_ids, (0, longest - part.mask.shape[1]), value=ends) for part in parts]),
            torch.cat([pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]),
        )
        return candidates, attention, stacked(log_probs)

    def _sample_part(self, policy: Any, queries: Queries) -> tuple[Candidates, list[float], Tensor | None]:
        """`sample` for queries that are sampled together."""
        prompts, records = embed_prompts(policy, queries.prompt_ids, queries.features), queries.records
        if not self.measures_attention:
            candidates, of_server = self.engine.sample(policy, prompts)
            return candidates, [], of_server

        def naming(candidates: Candidates) -> list[list[int]]:
            return self.lesions.naming_tokens(candidates, records)

        candidates, shares = generate_with_attention(
            policy, prompts, self.settings, naming, self.lesions.cover(records), self.lesions.settings
        )
        return candidates, shares.tolist(), None
