"""Our rewards in TRL's ``GRPOTrainer`` (TRL 1.x, transformers 5), on a model in transformers' form (``umed convert``).

A reward of :mod:`umed_plugin.rewards` has the signature that TRL calls, so with text prompts it is a ``reward_funcs`` entry as it
stands. For images TRL wants conversations, whose completions are lists of messages; and it only adds up weighted rewards.
`CombinedReward` is one ``reward_funcs`` entry that does both: it hands the rewards texts, and combines what they give per
question as stage 2 does (:func:`umed_plugin.rewards.combine_rewards`, with the division by the maximum over the candidates). What
TRL does to the sum (``scale_rewards``) comes on top; ``scale_rewards="none"`` leaves it as it is.

Vision relevance needs attention that TRL does not keep: `LesionAttention` reads it from the policy in a pass of its own, with the
hooks of stage 2 (:mod:`umed_plugin.model.attention`).

How to run: ``examples/trl_grpo.py``. Different from stage 2: a reward that says ``stop`` ends the run only with
:class:`umed_plugin.rewards.StopForReward` among the trainer's callbacks.
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
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.model.attention import AttentionSettings, attention_on_lesion
from umed_plugin.model.forward import Candidates, PromptBatch, base_llava
from umed_plugin.model.packing import packing_fault
from umed_plugin.model.token_spans import lesion_naming_tokens
from umed_plugin.rewards import combine_rewards, measured_by, start_rewards


def trl_dataset(records: Sequence[Record], image_folder: Path | str, model: Any) -> Any:
    """Records as a ``datasets.Dataset`` for ``GRPOTrainer``: a conversation with its image, and the columns that rewards read.

    Images are opened when they are asked for. Records are kept as JSON, since the columnar format would give each record the keys
    of all.

    Args:
        records: of ``umed recipe build``, in the aspect-ratio mode that the model's processor has.
        image_folder: that their ``image`` is below.
        model: transformers' model, for the size of its tower.
    """
    from datasets import Dataset

    tower = base_llava(model).config.vision_config

    def example(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = [json.loads(line) for line in batch["json"]]
        questions = [record["conversations"][0]["value"].replace("<image>", "").strip() for record in found]
        return {
            "prompt": [[{"role": "user", "content": question}] for question in questions],
            "image": [open_image(Path(image_folder) / record["image"], record.get("reading")) for record in found],
            "record": found,
            "geometry": [record_geometry(record, tower.image_size, tower.patch_size) for record in found],
        }

    return Dataset.from_dict({"json": [json.dumps(record) for record in records]}).with_transform(example)


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion as TRL gives it: a string, or a list of messages whose content is text or a list of parts."""
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return "".join(texts)


class LesionAttention:
    """Attention of the candidates' lesion names on the lesion's patches, from a pass of the policy over prompts and answers.

    Args:
        model: transformers' ``LlavaForConditionalGeneration``, PEFT-wrapped or not, not split among processes.
        processor: its processor, which the trainer has too.
        layers: of the language model; by default the last half.
        heads: by default all.
        sink_ratio: masks attention sinks (:func:`umed_plugin.model.attention.attention_sinks`); 0 masks none.
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
        """Share in 0..1 of each of N = Q*K candidates' attention on the image that falls on the lesion; 0 where none is named.

        Args:
            prompts: N conversations with their images, as TRL gives them to rewards.
            completion_ids: N lists of token ids.
            record, geometry: N, one a candidate.
            num_generations: K.
        """
        was_training = self._model.training
        self._model.eval()  # a dropout would shift the attention
        try:
            candidates = self._candidates(completion_ids)
            cover = [place.patch_cover(true_boxes(item)) for place, item in zip(geometry, record)][::num_generations]
            values, _ = attention_on_lesion(
                self._language,
                self._embed(prompts[::num_generations], len(cover[0])),
                candidates,
                lesion_naming_tokens(self._processor.tokenizer, candidates, record),
                torch.stack([torch.from_numpy(part) for part in cover]),
                AttentionSettings(self.layers, self._heads, self._sink_ratio),
                packed=self._language.choose_pass(),
            )
        finally:
            self._model.train(was_training)
        return values.tolist()

    def _candidates(self, completion_ids: Sequence[Sequence[int]]) -> Candidates:
        """Answers of different lengths as [N, T] ids and mask, padded on the right."""
        length = max(1, *map(len, completion_ids))
        eos = self._processor.tokenizer.eos_token_id
        ids = torch.tensor([[*row, *[eos] * (length - len(row))] for row in completion_ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in completion_ids])
        return Candidates(ids.to(self._language.device), mask.to(self._language.device))

    def _embed(self, prompts: Sequence[Any], n_patches: int) -> PromptBatch:
        """Q conversations as the language model sees them, the image's features in their places."""
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
        # A tower that keeps its class token puts it before the patches.
        start = image.int().argmax(dim=1) + image.sum(dim=1) - n_patches
        return PromptBatch(embeds, inputs["attention_mask"], start, n_patches)


class _LanguageModel:
    """Transformers' model as :mod:`umed_plugin.model.attention` looks at LLaVA's: its decoder, without making logits of
    any token.
    """

    def __init__(self, model: Any) -> None:
        self._decoder = model.get_decoder()
        text = self._decoder.config
        self.config = SimpleNamespace(
            model_type=text.model_type,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            rope_theta=text.rope_parameters["rope_theta"],
            rope_scaling=text.rope_parameters,
            sliding_window=getattr(text, "sliding_window", None),  # Llama has none
            _attn_implementation=text._attn_implementation,
        )
        self._output = torch.nn.Identity()
        self.training = self.is_gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        return next(self._decoder.parameters()).device

    def choose_pass(self) -> bool:
        """Whether all answers to a question stand in one row behind it; else they read its cache."""
        packed = packing_fault(self) is None
        self.training = self.is_gradient_checkpointing = packed  # then no cache is kept
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
    """Several rewards as one entry of ``reward_funcs``, combined per question as stage 2 combines them.

    Their means go to TRL's log as ``reward/<name>``, with what the rewards measure themselves.

    Args:
        rewards: by name, such as ``{name: REWARDS.get(name) for name in ("relevance", "localization")}``.
        num_generations: K, that of ``GRPOConfig``. The K candidates of a question must be in one process:
            ``per_device_train_batch_size * steps_per_generation`` is a multiple of K.
        weights: by name; by default 1 each.
        norm: of :func:`umed_plugin.rewards.combine_rewards`, as is ``floor``.
        floor: least value that a maximum is taken for.
        attention: needed for the reward ``vision_relevance``.
    """

    __name__ = "umed"  # what TRL's log calls it

    def __init__(
        self,
        rewards: Mapping[str, Any],
        num_generations: int,
        *,
        weights: Mapping[str, float] | None = None,
        norm: str = "max",
        floor: float = 0.1,
        attention: LesionAttention | None = None,
    ) -> None:
        if "vision_relevance" in rewards and attention is None:
            raise UsageError(
                "reward 'vision_relevance' needs CombinedReward(..., attention=LesionAttention(model, processor))."
            )
        self._rewards, self._k, self._attention = dict(rewards), num_generations, attention
        self._weights = {name: (weights or {}).get(name, 1.0) for name in rewards}
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
        """N = Q*K rewards, query-major; called by TRL."""
        self._check_groups(record)
        texts = [completion_text(completion) for completion in completions]
        questions = [item["conversations"][0]["value"] for item in record]
        shared = {**columns, "completion_ids": completion_ids, "record": record, "geometry": geometry}
        start_rewards(self._rewards, questions, texts, **shared)
        attention: Sequence[float | None] = [None] * len(texts)
        if self._attention is not None:
            attention = self._attention(prompts, completion_ids, record, geometry, self._k)
        values = {n: r(questions, texts, attention_on_lesion=attention, **shared) for n, r in self._rewards.items()}
        for name, column in values.items():
            known = [value for value in column if value is not None]
            if known:
                log_metric(f"reward/{name}", sum(known) / len(known))
        for name, value in measured_by(self._rewards).items():
            log_metric(name, value)
        combined: Tensor = combine_rewards(
            values,
            self._k,
            weights=self._weights,
            norm=self._norm,
            max_normalised=[n for n, reward in self._rewards.items() if getattr(reward, "max_normalised", False)],
            floor=self._floor,
            least_maxima={n: getattr(reward, "least_maximum", 0.0) for n, reward in self._rewards.items()},
        )
        return combined.flatten().tolist()

    def _check_groups(self, record: Sequence[Record]) -> None:
        """Refuse a batch whose groups are cut: the maximum would run over the candidates of several questions."""
        groups = [record[start : start + self._k] for start in range(0, len(record), self._k)]
        if any(len(group) != self._k or any(item != group[0] for item in group) for group in groups):
            raise UmedError(
                f"{len(record)} candidates came that are not {self._k} in a row for each question. num_generations of "
                "CombinedReward must be that of GRPOConfig (num_generations_eval too), and per_device_train_batch_size * "
                "steps_per_generation a multiple of it."
            )
