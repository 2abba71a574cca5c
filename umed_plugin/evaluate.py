"""Evaluation: greedy answers to the records' questions, scored as the rewards score them, with confidence intervals.

Metrics, all 0-1:

- ``accuracy``: share of studies whose answer names exactly the true classes (for one without abnormality: none, and no box).
- ``mean_iou``: mean set IoU over the studies WITH a lesion; unmatched boxes, true or predicted, count as 0.
- ``acc_at_50``: share of the studies with a lesion whose set IoU is at least 0.5.
- ``vision_relevance``: mean attention of the tokens that name the abnormality on the lesion's patches, over the studies with
  a lesion; 0 where it is not named.

Studies without a lesion are left out of the last three, where "no box" would score 1 without a look at the image; a box that is
drawn on one of them costs accuracy. ``<name>_ci95`` is the 95 % percentile bootstrap interval over studies, with a fixed
generator: the same answers give the same interval.

How to run: ``umed evaluate CKPT --benchmark RECIPE_OR_JSON``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.records import Record

METRICS = ("accuracy", "mean_iou", "acc_at_50", "vision_relevance")
TEMPLATES_BY_TYPE = {"llava_mistral": "umed_mistral", "llava_llama": "umed_v1", "llava": "umed_v1"}
RESAMPLES = 2000


@dataclass(frozen=True)
class Case:
    """One study: what was asked, answered and true, and how the answer scores.

    Attributes:
        image: path of the image file as the model's loader opened it.
        true_boxes: xyxy in pixels of the image file.
        boxes: predicted, in the same pixels; a malformed box is all zeros.
        vision_relevance: None for a study without a lesion.
    """

    id: str
    image: str
    question: str
    answer: str
    true_classes: list[str]
    true_boxes: list[list[float]]
    boxes: list[list[float]]
    accuracy: float
    set_iou: float
    vision_relevance: float | None

    def value(self, metric: str) -> float | None:
        """The case's value of a metric, or None where the metric does not ask about it."""
        if metric == "accuracy":
            return self.accuracy
        if not self.true_boxes:
            return None
        if metric == "mean_iou":
            return self.set_iou
        return float(self.set_iou >= 0.5) if metric == "acc_at_50" else self.vision_relevance


@dataclass(frozen=True)
class Evaluation:
    """The cases of one checkpoint and the metrics over them."""

    checkpoint: str
    template: str
    cases: list[Case]
    metrics: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path | str) -> None:
        """Write ``evaluation.json`` (metrics) and ``predictions.jsonl`` (one case a line) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(case), ensure_ascii=False) for case in self.cases]
        (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        summary = {"checkpoint": self.checkpoint, "template": self.template, **self.metrics}
        aside = folder / "evaluation.json.partial"
        aside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, folder / "evaluation.json")


def evaluate(
    checkpoint: Path | str,
    records: Sequence[Record],
    *,
    image_folder: Path | str = "",
    template: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    base: Path | str | None = None,
    device: str | None = None,
    image_cache: Path | str | None = None,
    image_cache_gb: float = 20.0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask a checkpoint every record's question, greedily, and score the answers.

    Args:
        checkpoint: a full checkpoint, or a LoRA folder over ``base``.
        records: with the same ``image_aspect_ratio`` as the checkpoint.
        image_folder: goes before the records' relative image paths.
        template: of the prompt; by default the umed template of the checkpoint's family.
        batch_size: studies at a time.
        max_new_tokens: longest answer.
        base: of a LoRA folder.
        device: ``cuda`` (float16) where there is one, else ``cpu`` (float32).
        image_cache: folder that keeps images decoded and resized (`umed_plugin.image_cache`).
        image_cache_gb: most that it may hold, in GB.
        progress: called with (studies done, studies in all).
    """
    import torch

    from umed_plugin.checkpoint import load_checkpoint
    from umed_plugin.rollout import base_llava

    if not records:
        raise UmedError("there is nothing to evaluate on: no records. Is it the right --split?")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Stock LLaVA answers in half precision, which a CPU cannot compute.
    dtype = torch.float32 if device == "cpu" else torch.float16
    tokenizer, model, processor = load_checkpoint(checkpoint, base, device, dtype)
    template = template or TEMPLATES_BY_TYPE[model.config.model_type]
    _check_aspect_ratio(records, getattr(model.config, "image_aspect_ratio", "square"), checkpoint)
    seen = _Seen(processor, base_llava(model).config, image_cache, image_cache_gb)
    cases: list[Case] = []
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        cases += _ask(model, tokenizer, seen, batch, str(image_folder), template, max_new_tokens)
        if progress is not None:
            progress(len(cases), len(records))
    return Evaluation(str(checkpoint), template, cases, metrics(cases))


def _check_aspect_ratio(records: Sequence[Record], model_mode: str, checkpoint: Path | str) -> None:
    model_mode = "pad" if model_mode == "pad" else "square"
    other = [record["id"] for record in records if record["provenance"]["image_aspect_ratio"] != model_mode]
    if other:
        raise UmedError(
            f"{checkpoint}: sees images as {model_mode!r} (image_aspect_ratio in config.json), but {len(other)} of "
            f"{len(records)} records, the first {other[0]!r}, were built otherwise: their boxes would be in the wrong place. "
            f"Build them with: umed recipe build RECIPE --image-aspect-ratio {model_mode} --out FILE"
        )


def _ask(
    model: Any, tokenizer: Any, seen: _Seen, records: Sequence[Record], image_folder: str, template: str, limit: int
) -> list[Case]:
    """Greedy answers of one batch of records, scored."""
    import torch

    from umed_plugin.rollout import base_llava, decode_answers, embed_prompts, encode_images
    from umed_plugin.sampling import generate
    from umed_plugin.scoring import score_answer

    llava = base_llava(model)
    paths = [os.path.join(image_folder, record["image"]) for record in records]
    pixels = seen.pixels(paths, records)
    questions = [record["conversations"][0]["value"].replace("<image>", "").strip() for record in records]
    ids = [prompt_ids(question, template, tokenizer, llava.config) for question in questions]
    with torch.no_grad():
        prompts = embed_prompts(model, ids, encode_images(model, pixels))
        answers = generate(model, prompts, max_new_tokens=limit, temperature=0.0, eos_token_id=tokenizer.eos_token_id)
        relevance = _vision_relevance(model, tokenizer, prompts, answers, records)
    texts = decode_answers(tokenizer, answers)
    cases = []
    for record, path, question, text, looked in zip(records, paths, questions, texts, relevance):
        score = score_answer(text, record, _geometry(llava, record))
        true = [list(map(float, box)) for box in record["objects"]["bbox"]]
        cases.append(
            Case(
                id=str(record["id"]),
                image=path,
                question=question,
                answer=text,
                true_classes=list(record["objects"]["ref"]),
                true_boxes=true,
                boxes=[[round(float(value), 3) for value in box] for box in score.boxes],
                accuracy=score.accuracy,
                set_iou=score.set_iou,
                vision_relevance=looked if true else None,
            )
        )
    return cases


def prompt_ids(question: str, template: str, tokenizer: Any, config: Any) -> Any:
    """Token ids [L] of a question about an image, with LLaVA's image token in it, as training and stock LLaVA write it."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
    from llava.mm_utils import tokenizer_image_token

    from umed_plugin.conversation import question_prompt

    image = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
    return tokenizer_image_token(question_prompt(f"{image}\n{question}", template), tokenizer, return_tensors="pt")


class _Seen:
    """Images as the model sees them, decoded each time or through a cache."""

    def __init__(self, processor: Any, config: Any, folder: Path | str | None, most_gb: float) -> None:
        from umed_plugin.image_cache import ImageCache

        self.processor, self.config = processor, config
        mode = "pad" if getattr(config, "image_aspect_ratio", None) == "pad" else "square"
        self.cache = None if folder is None else ImageCache(folder, processor, mode, int(most_gb * 1e9))

    def pixels(self, paths: Sequence[str], records: Sequence[Record]) -> Any:
        """[Q, 3, S, S] of Q images."""
        import torch
        from llava.mm_utils import process_images

        if self.cache is None:
            return process_images([_open(*pair) for pair in zip(paths, records)], self.processor, self.config)
        with_cache = self.cache.pixels
        return torch.stack([_readable(with_cache, path, record) for path, record in zip(paths, records)])


def _open(path: str, record: Record) -> Any:
    from umed_plugin.images import open_image

    return _readable(open_image, path, record)


def _readable(read: Callable[..., Any], path: str, record: Record) -> Any:
    try:
        return read(path, record.get("reading"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UmedError(f"{path}: cannot be read as an image ({error}). Check the file, or --data-root.") from error


def _geometry(llava: Any, record: Record) -> Any:
    from umed_plugin.records import record_geometry

    tower = llava.get_vision_tower().config
    return record_geometry(record, tower.image_size, tower.patch_size)


def _vision_relevance(model: Any, tokenizer: Any, prompts: Any, answers: Any, records: Sequence[Record]) -> list[float]:
    """Attention of each answer's naming tokens on the lesion's patches, 0-1, over all layers and heads."""
    import torch

    from umed_plugin.attention import attention_on_lesion, lesion_name_rows
    from umed_plugin.rollout import base_llava

    llava = base_llava(model)
    rows = lesion_name_rows(tokenizer, answers, records)
    cover = torch.stack(
        [torch.from_numpy(_geometry(llava, record).patch_cover(record["objects"]["bbox"])) for record in records]
    )
    layers = list(range(llava.config.num_hidden_layers))
    values, _ = attention_on_lesion(model, prompts, answers, rows, cover, layers)
    return [round(value, 6) for value in values.tolist()]


def metrics(cases: Sequence[Case]) -> dict[str, Any]:
    """Every metric with its interval, ``n`` (studies) and ``n_with_lesion``; a metric that no case answers is None."""
    result: dict[str, Any] = {}
    for name in METRICS:
        values = [value for case in cases if (value := case.value(name)) is not None]
        result[name] = sum(values) / len(values) if values else None
        result[f"{name}_ci95"] = mean_interval(values)
    result["n"] = len(cases)
    result["n_with_lesion"] = sum(bool(case.true_boxes) for case in cases)
    return result


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Paired differences ``after - before`` over the same studies: ``{metric: {difference, ci95, n}}``.

    Raises:
        UmedError: the two did not answer the same studies.
    """
    earlier = {case.id: case for case in before.cases}
    if len(earlier) != len(before.cases) or set(earlier) != {case.id for case in after.cases}:
        raise UmedError(
            f"{before.checkpoint} and {after.checkpoint} were not asked about the same studies, so they cannot be compared "
            "pair by pair. Evaluate both on the same records."
        )
    result: dict[str, Any] = {}
    for name in METRICS:
        pairs = [(earlier[case.id].value(name), case.value(name)) for case in after.cases]
        differences = [new - old for old, new in pairs if old is not None and new is not None]
        mean = sum(differences) / len(differences) if differences else None
        result[name] = {"difference": mean, "ci95": mean_interval(differences), "n": len(differences)}
    return result


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean; of one value, or of equal values, the value twice."""
    import numpy as np
    from scipy.stats import bootstrap

    if not values:
        return None
    if len(set(values)) == 1:
        return [float(values[0])] * 2
    sample = np.asarray(values, dtype=float)
    found = bootstrap(
        (sample,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    return [float(found.low), float(found.high)]
