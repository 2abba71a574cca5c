"""The rewards in TRL's ``GRPOTrainer`` (TRL 1.x, transformers 5), on a model in transformers' format (``umed convert``).

A reward of :mod:`umed_plugin.rewards` has the signature that TRL calls. With text prompts, it is a ``reward_funcs`` entry as it
is. With images, TRL uses conversations, whose completions are lists of messages, and TRL only adds up weighted rewards.
`CombinedReward` is one ``reward_funcs`` entry that solves both: it passes texts to the rewards, and combines their values per
question as stage 2 does (:func:`umed_plugin.rewards.combine_rewards`, with the division by the maximum over the candidates).
TRL's ``scale_rewards`` then applies to the sum; ``scale_rewards="none"`` leaves the sum unchanged.

Vision relevance needs attention weights that TRL does not keep. `LesionAttention` reads them from the policy in an extra forward
pass, with the hooks of stage 2 (:mod:`umed_plugin.model.attention`).

How to run: ``examples/trl_grpo.py``. Unlike in stage 2, a reward that sets ``stop`` ends the run only with
:class:`umed_plugin.training.stopping.StopForReward` among the trainer's callbacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from umed_plugin.data.images import open_image
from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.errors import UmedError, UsageError, unknown_name
from umed_plugin.flags.names import REWARD_NORMS
from umed_plugin.flags.weights import FORMS, Weight, faults
from umed_plugin.model.attention import AttentionSettings, attention_on_lesion
from umed_plugin.model.forward import Candidates, PromptBatch, base_llava
from umed_plugin.model.packing import packing_fault
from umed_plugin.model.token_spans import lesion_naming_tokens
from umed_plugin.rewards import (
    collect_metrics,
    combine_rewards,
    end_rollout,
    normalisation_of,
    reward_of_run,
    run_rewards,
    start_rewards,
)


def trl_dataset(records: Sequence[Record], image_folder: Path | str, model: Any) -> Any:
    """Records as a ``datasets.Dataset`` for ``GRPOTrainer``: a conversation with its image, and the columns that rewards read.

    Images are opened on access. Records are stored as JSON, because the columnar format would give each record the keys of all.

    Args:
        records: of ``umed recipe build``, in the aspect-ratio mode of the model's processor.
        image_folder: folder that the records' ``image`` paths are relative to.
        model: transformers' model, for the image and patch size of its vision tower.
    """
    from datasets import Dataset

    tower = base_llava(model).config.vision_config

    def example(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        parsed = [json.loads(line) for line in batch["json"]]
        questions = [record["conversations"][0]["value"].replace("<image>", "").strip() for record in parsed]
        return {
            "prompt": [[{"role": "user", "content": question}] for question in questions],
            "image": [open_image(Path(image_folder) / record["image"], record.get("reading")) for record in parsed],
            "record": parsed,
            "geometry": [record_geometry(record, tower.image_size, tower.patch_size) for record in parsed],
        }

    return Dataset.from_dict({"json": [json.dumps(record) for record in records]}).with_transform(example)


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of TRL's completion: a string, or a list of messages whose content is a string or a list of parts."""
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return "".join(texts)


class LesionAttention:
    """Attention from the candidates' lesion names to the lesion's patches, by one forward pass over prompts and answers.

    Args:
        model: transformers' ``LlavaForConditionalGeneration``, PEFT-wrapped or not, not sharded across ranks.
        processor: the model's processor, the one that the trainer uses.
        layers: indices of decoder layers; default: the last half.
        heads: indices of heads; default: all.
        sink_ratio: masks attention sinks (:func:`umed_plugin.model.patch_attention.attention_sinks`); 0 masks none.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        sink_ratio: float = 0.0,
    ) -> None:
        self._model, self._processor = model, processor
        self._language = _LanguageModel(base_llava(model))
        count = len(self._language.get_model().layers)
        self.layers = list(range(count // 2, count)) if layers is None else list(layers)
        self._heads, self._sink_ratio = heads, sink_ratio

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        record: Sequence[Record],
        geometry: Sequence[Any],
        num_generations: int,
    ) -> list[float]:
        """Share of each candidate's image attention that falls on the lesion, in 0..1; 0 where the answer names no lesion.

        Args:
            prompts: N = Q*K conversations with their images, as TRL passes them to rewards.
            completion_ids: N lists of token ids.
            record, geometry: N, one per candidate.
            num_generations: K.
        """
        was_training = self._model.training
        self._model.eval()  # dropout would change the attention
        try:
            candidates = self._candidates(completion_ids)
            # Image, question and lesion are the same for the K candidates: one per question is enough.
            first = slice(None, None, num_generations)
            cover = [square.patch_cover(true_boxes(study)) for square, study in zip(geometry[first], record[first])]
            values, _ = attention_on_lesion(
                self._language,
                self._embed(prompts[first], len(cover[0])),
                candidates,
                lesion_naming_tokens(self._processor.tokenizer, candidates, record),
                torch.stack([torch.from_numpy(patches) for patches in cover]),
                AttentionSettings(self.layers, self._heads, self._sink_ratio),
                packed=self._language.choose_pass(),
            )
        finally:
            self._model.train(was_training)
        return values.tolist()

    def _candidates(self, completion_ids: Sequence[Sequence[int]]) -> Candidates:
        """Answers as [N, T] token ids and mask (1 = answer token), padded on the right."""
        length = max(1, *map(len, completion_ids))
        eos = self._processor.tokenizer.eos_token_id
        ids = torch.tensor([[*row, *[eos] * (length - len(row))] for row in completion_ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in completion_ids])
        return Candidates(ids.to(self._language.device), mask.to(self._language.device))

    def _embed(self, prompts: Sequence[Any], n_patches: int) -> PromptBatch:
        """Embeddings [Q, L, D] of Q conversations, padded on the left, with the image features in place of the image tokens."""
        model = base_llava(self._model)
        inputs = self._processor.apply_chat_template(
            list(prompts),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self._language.device)
        pixels = inputs["pixel_values"].to(model.dtype)
        features = torch.cat(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        image = inputs["input_ids"] == model.config.image_token_id
        embeds = embeds.masked_scatter(image[..., None], features.to(embeds.dtype))
        # A vision tower that keeps its class token puts it before the patches.
        start = image.int().argmax(dim=1) + image.sum(dim=1) - n_patches
        return PromptBatch(embeds, inputs["attention_mask"], start, n_patches)


class _LanguageModel:
    """Transformers' model with the interface of LLaVA's that :mod:`umed_plugin.model.attention` uses: its decoder, no logits."""

    def __init__(self, model: Any) -> None:
        self._decoder = model.get_decoder()
        text = self._decoder.config
        self.config = SimpleNamespace(
            model_type=text.model_type,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            rope_theta=text.rope_parameters["rope_theta"],
            rope_scaling=text.rope_parameters,
            sliding_window=getattr(text, "sliding_window", None),  # Llama has no such key
            _attn_implementation=text._attn_implementation,
        )
        self._output = torch.nn.Identity()
        self.training = self.is_gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        return next(self._decoder.parameters()).device

    def choose_pass(self) -> bool:
        """Whether all answers to a question are packed into one row behind it; otherwise they read its KV cache."""
        packed = packing_fault(self) is None
        self.training = self.is_gradient_checkpointing = packed  # then no KV cache is kept
        return packed

    def get_model(self) -> Any:
        return self._decoder

    def get_input_embeddings(self) -> Any:
        return self._decoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self._output

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self._output(self._decoder(**inputs).last_hidden_state))


class CombinedReward:
    """Several rewards as one entry of ``reward_funcs``, combined per question as in stage 2.

    TRL logs the mean of each as ``reward/<name>``, and the rewards' own metrics.

    Args:
        rewards: by name, such as ``{name: REWARDS.get(name) for name in ("relevance", "localization")}``.
        num_generations: K, as in ``GRPOConfig``. All K candidates of a question must be on one rank, so
            ``per_device_train_batch_size * steps_per_generation`` must be a multiple of K.
        weights: by name; default: 1 each. A text as in ``--umed_reward_weights``, such as ``0..1``, changes over the run.
        norm: ``max``, ``zscore`` or ``none``, see :func:`umed_plugin.rewards.combine_rewards`.
        floor: lower bound of the maximum that ``max`` divides by, as a multiple of each reward's scale.
        attention: required for the reward ``vision_relevance``.
        records: of the training split, for rewards that learn from them, such as ``format``.

    Raises:
        UsageError: ``vision_relevance`` without ``attention``, a reward that changes over a run, a weight of a reward that is
            not there, or a weight, ``norm`` or ``floor`` that is not allowed.
    """

    __name__ = "umed"  # the name in TRL's log

    def __init__(
        self,
        rewards: Mapping[str, Any],
        num_generations: int,
        *,
        weights: Mapping[str, float | str] | None = None,
        norm: str = "max",
        floor: float = 0.1,
        attention: LesionAttention | None = None,
        records: Sequence[Record] = (),
    ) -> None:
        if "vision_relevance" in rewards and attention is None:
            raise UsageError(
                "reward 'vision_relevance' needs CombinedReward(..., attention=LesionAttention(model, processor))."
            )
        changing = [name for name, reward in rewards.items() if hasattr(reward, "advance")]
        if changing:
            raise UsageError(
                f"reward {changing[0]!r} changes over a run, and TRL's checkpoints keep nothing of a reward: a resumed run would "
                "begin with it anew. Use it in stage 2 (umed-run), or another reward, such as localization."
            )
        self._rewards = {name: reward_of_run(reward, records) for name, reward in rewards.items()}
        self._k, self._attention = num_generations, attention
        self._schedule = _schedule(list(rewards), weights or {})
        if norm not in REWARD_NORMS:
            raise UsageError(f"CombinedReward(norm=...): {unknown_name('norm', str(norm), REWARD_NORMS)}")
        if not 0 <= floor <= 1:
            raise UsageError(f"CombinedReward(floor={floor!r}): must be a number of 0 to 1.")
        self._norm, self._floor = norm, floor

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]],
        record: Sequence[Record],
        geometry: Sequence[Any],
        log_metric: Any,
        **columns: Any,
    ) -> list[float]:
        """[N = Q*K] rewards, query-major; TRL calls this.

        Raises:
            UmedError: the candidates of a question are not K in a row.
        """
        self._check_groups(record)
        texts = [completion_text(completion) for completion in completions]
        questions = [study["conversations"][0]["value"] for study in record]
        shared = {**columns, "completion_ids": completion_ids, "record": record, "geometry": geometry}
        start_rewards(self._rewards, questions, texts, **shared)
        attention: Sequence[float | None] = [None] * len(texts)
        if self._attention is not None:
            attention = self._attention(prompts, completion_ids, record, geometry, self._k)
        shared["attention_on_lesion"] = attention
        values = run_rewards(self._rewards, questions, texts, **shared)
        end_rollout(self._rewards)
        for name, column in values.items():
            known = [value for value in column if value is not None]
            if known:
                log_metric(f"reward/{name}", sum(known) / len(known))
        for name, value in collect_metrics(self._rewards).items():
            log_metric(name, value)
        combined: Tensor = combine_rewards(
            values,
            self._k,
            weights=self._weights(columns.get("trainer_state"), log_metric),
            norm=self._norm,
            floor=self._floor,
            **normalisation_of(self._rewards, shared),
        )
        return combined.flatten().tolist()

    def _weights(self, state: Any, log_metric: Any) -> dict[str, float]:
        """The weights at TRL's current step, not rollout, which TRL does not tell; those that change are logged."""
        changing = [name for name, weight in self._schedule.items() if weight.changes]
        if changing and state is None:
            raise UmedError(
                f"the weight of {changing[0]!r} changes over the run, and this TRL passes no trainer_state."
            )
        progress = min(state.global_step / max(state.max_steps - 1, 1), 1.0) if changing else 0.0
        weights = {name: weight.at(progress) for name, weight in self._schedule.items()}
        for name in changing:
            log_metric(f"weight/{name}", weights[name])
        return weights

    def _check_groups(self, record: Sequence[Record]) -> None:
        """Refuse a batch with split groups: the maximum would run over candidates of several questions."""
        groups = [record[start : start + self._k] for start in range(0, len(record), self._k)]
        if any(len(group) != self._k or any(study != group[0] for study in group) for group in groups):
            raise UmedError(
                f"the {len(record)} candidates of a batch are not {self._k} in a row for each question. num_generations of "
                "CombinedReward must equal that of GRPOConfig (and num_generations_eval), and per_device_train_batch_size * "
                "steps_per_generation must be a multiple of it."
            )


def _schedule(names: Sequence[str], given: Mapping[str, float | str]) -> dict[str, Weight]:
    """The weight of each reward over a run, 1 where none is given; refuses what ``--umed_reward_weights`` refuses."""
    argument = f"CombinedReward(weights={dict(given)})"
    for name in given:
        if name not in names:
            raise UsageError(f"{argument}: {unknown_name('reward', str(name), names)}")
    try:
        schedule = {name: Weight.read(str(given.get(name, 1.0))) for name in names}
    except ValueError:
        raise UsageError(f"{argument}: must be {FORMS}.") from None
    for fault in faults(list(schedule.values()), argument):
        raise UsageError(fault)
    return schedule
