"""A checkpoint loaded for answering, and the images as it sees them.

Images go through the same loader as in training (`umed_plugin.data.images`): formats that LLaVA reads by itself, and DICOM, NIfTI
and 16-bit files with the window and slice that a record names. On a GPU answers are in half precision, like those of stock LLaVA.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.checkpoints.folder import STOCK_TEMPLATES
from umed_plugin.checkpoints.prompt_templates import warn_of_other_family
from umed_plugin.checkpoints.state import checkpoint_hashes
from umed_plugin.errors import UmedError, warn
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.processor import GIVE_SIZES, missing_size, processor_fault
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.remote.settings import ROLLOUT_MAX_DIFFERENCE

if TYPE_CHECKING:
    from umed_plugin.model.shared_prefix import Continuation
    from umed_plugin.remote.rollout_server import RolloutServer

Reading = Mapping[str, Any]
# A further pass over the answers of a batch, while its prompts are in memory. It gets the indices of the N questions that were
# answered in text, their embedded prompts (`forward.PromptBatch`) and their answers (`forward.Candidates`). It returns N dicts of
# JSON values.
Examine = Callable[[Sequence[int], Any, Any], "list[dict[str, Any]]"]


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image, and what is wanted of the model.

    Attributes:
        image: path of the file, or folder of a DICOM series.
        text: the question, without image token; None: there is none.
        options: texts whose likelihood is wanted, as ``" {option}."`` behind ``options_after``.
        options_after: bare text behind the image, without template; None: the question in its template.
        write: whether to answer the question in text.
        reading: arguments of `umed_plugin.data.images.load_image` for a file that LLaVA cannot read by itself.
    """

    image: str
    text: str | None
    options: Sequence[str] = ()
    options_after: str | None = None
    write: bool = True
    reading: Reading | None = None


@dataclass(frozen=True)
class ModelAnswer:
    """The model's answer.

    Attributes:
        text: empty if none was wanted.
        losses: mean cross-entropy of each option, nats.
        examined: what a further pass over the answer found; None if there was none.
    """

    text: str
    losses: list[float]
    examined: dict[str, Any] | None = None


@dataclass(frozen=True)
class AnswererSettings:
    """How a checkpoint is loaded and prompted.

    Attributes:
        base: base checkpoint of a LoRA folder.
        template: of prompts; None: the one that ``templates`` names for the checkpoint's family.
        templates: model_type -> template.
        device: None: ``cuda`` if there is one, else ``cpu``.
        dtype: of the weights; None: as `umed_plugin.checkpoints.precision.answering_precision` chooses.
        image_cache: folder that keeps images decoded and resized.
        image_cache_gb: its maximum size in GB.
        max_new_tokens: longest answer.
        server: rollout server that writes the answers; None: this process does.
        server_adapters: folder where the server reads the adapter of a LoRA folder; None: a temporary one.
        server_max_difference: largest mean distance of the server's log-probabilities from those here, in nats a token.
    """

    base: Path | str | None = None
    template: str | None = None
    templates: Mapping[str, str] = field(default_factory=lambda: STOCK_TEMPLATES)
    device: str | None = None
    dtype: str | None = None
    image_cache: Path | str | None = None
    image_cache_gb: float = 20.0
    max_new_tokens: int = 128
    server: RolloutServer | None = None
    server_adapters: Path | None = None
    server_max_difference: float = ROLLOUT_MAX_DIFFERENCE


class Answerer:
    """A loaded checkpoint.

    Args:
        checkpoint: a full LLaVA checkpoint, UMed or not, or a LoRA folder over ``settings.base``.
        settings: see `AnswererSettings`.
    """

    def __init__(self, checkpoint: Path | str, settings: AnswererSettings | None = None) -> None:
        from umed_plugin.checkpoints.loading import load_checkpoint
        from umed_plugin.checkpoints.precision import answering_device, answering_precision, torch_dtype
        from umed_plugin.checkpoints.prompt_templates import check_template
        from umed_plugin.model.forward import base_llava

        settings, self._checkpoint = settings or AnswererSettings(), checkpoint
        check_template(settings.template)
        self.device = answering_device(settings.device)
        self.dtype = answering_precision(checkpoint, settings.base, self.device, settings.dtype)
        loaded = load_checkpoint(checkpoint, settings.base, self.device, torch_dtype(self.dtype))
        self.tokenizer, self.model, self.processor = loaded
        self.llava = base_llava(self.model)
        warn_of_other_family(settings.template, self.llava.config.model_type)
        self.template = settings.template or settings.templates[self.llava.config.model_type]
        self.max_new_tokens = settings.max_new_tokens
        self._hashes = checkpoint_hashes(checkpoint, settings.base)
        self._writer = None if settings.server is None else _server_writer(settings, self.model)
        config, cache, cache_gb = self.llava.config, settings.image_cache, settings.image_cache_gb
        self.images = ModelImages(checkpoint, self.processor, config, cache, cache_gb)

    def fingerprint(self) -> dict[str, Any]:
        """All of checkpoint and prompting that answers depend on, but not the checkpoint's path, as folders may be moved."""
        prompting = {"template": self.template, "device": self.device, "max_new_tokens": self.max_new_tokens}
        if self.dtype != ("float32" if self.device == "cpu" else "float16"):
            prompting["dtype"] = self.dtype  # only then: earlier versions had no choice, and kept answers without it
        if self._writer is not None:
            prompting["server"] = True  # answers may differ by rounding
        return {"weights": self._hashes, **prompting}

    def scorer(self, dialect: BoxDialect = LLAVA) -> Scorer:
        """The scorer of this checkpoint's answers."""
        tower = self.llava.get_vision_tower().config
        return Scorer(self.images.mode, tower.image_size, tower.patch_size, dialect)

    def features(self, paths: Sequence[str], readings: Sequence[Reading | None]) -> Any:
        """[B, patches, D] features of the vision tower for B images."""
        import torch

        from umed_plugin.model.forward import encode_images

        with torch.no_grad():
            return encode_images(self.model, self.images.pixels(paths, readings))

    def prompt_ids(self, question: str) -> Any:
        """Token ids [L] of a question in its template, with the image token."""
        return prompt_ids(question, self.template, self.tokenizer, self.llava.config)

    def answer(self, questions: Sequence[ImageQuestion], examine: Examine | None = None) -> list[ModelAnswer]:
        """Answer a batch. Questions about one image share its computation, wherever they stand in the batch.

        Args:
            questions: at least one.
            examine: a further pass over the written answers; what it returns becomes `ModelAnswer.examined`.

        Raises:
            UmedError: the model computes no finite numbers.
        """
        from umed_plugin.model.sampling import NotFiniteError

        try:
            return self._answer(questions, examine)
        except NotFiniteError as error:
            raise UmedError(
                f"{self._checkpoint}: {error}. Either its weights are too (umed doctor finds them), or {self.dtype} is too "
                "narrow for it: use --dtype bfloat16 or float32."
            ) from None

    def _answer(self, questions: Sequence[ImageQuestion], examine: Examine | None) -> list[ModelAnswer]:
        import torch

        from umed_plugin.model.forward import decode_answers, embed_prompts

        # Each image is encoded once; image_index[i] says which one question i is about.
        images = list(dict.fromkeys(image_key(question.image, question.reading) for question in questions))
        first = {image_key(question.image, question.reading): question for question in reversed(questions)}
        features = self.features([path for path, _ in images], [first[key].reading for key in images])
        image_index = [images.index(image_key(question.image, question.reading)) for question in questions]

        texts = [""] * len(questions)
        examined: list[dict[str, Any] | None] = [None] * len(questions)
        written = [i for i, question in enumerate(questions) if question.text is not None and question.write]
        if written:
            ids = [self.prompt_ids(questions[i].text or "") for i in written]
            candidates = self._write(features, [image_index[i] for i in written], ids)
            for i, text in zip(written, decode_answers(self.tokenizer, candidates)):
                texts[i] = text
            if examine is not None:
                with torch.no_grad():
                    prompts = embed_prompts(self.model, ids, features[[image_index[i] for i in written]])
                for i, finding in zip(written, examine(written, prompts, candidates)):
                    examined[i] = finding
        losses = self._losses(questions, image_index, features)
        return [ModelAnswer(*parts) for parts in zip(texts, losses, examined)]

    def _write(self, features: Any, images: Sequence[int], ids: Sequence[Any]) -> Any:
        """Greedy answers (`forward.Candidates`) to prompts about images of these indices, by the server if there is one."""
        import torch

        from umed_plugin.model.forward import embed_prompts
        from umed_plugin.model.shared_prefix import answer_greedily

        limit, eos = self.max_new_tokens, self.tokenizer.eos_token_id
        if self._writer is not None:
            with torch.no_grad():
                prompts = embed_prompts(self.model, [row.to(features.device) for row in ids], features[list(images)])
            return self._writer.write(prompts, limit, eos)
        used = sorted(set(images))
        return answer_greedily(self.model, features[used], [used.index(index) for index in images], ids, limit, eos)

    def _losses(
        self, questions: Sequence[ImageQuestion], image_index: Sequence[int], features: Any
    ) -> list[list[float]]:
        """For each question the mean cross-entropy of its options."""
        from umed_plugin.model.shared_prefix import continuation_losses

        losses: list[list[float]] = [[] for _ in questions]
        # Bare prompts and prompts in a template differ before the image, so they share no prefix.
        for bare in (False, True):
            options = [
                (index, self._continuation(image_index[index], question, option))
                for index, question in enumerate(questions)
                if bare == (question.options_after is not None)
                for option in question.options
            ]
            if options:
                values = continuation_losses(self.model, features, [continuation for _, continuation in options])
                for (index, _), loss in zip(options, values):
                    losses[index].append(loss)
        return losses

    def _continuation(self, image: int, question: ImageQuestion, option: str) -> Continuation:
        from llava.mm_utils import tokenizer_image_token

        from umed_plugin.checkpoints.prompt_templates import question_prompt
        from umed_plugin.model.shared_prefix import Continuation

        if question.options_after is None:
            prompt = question_prompt(image_and(question.text or "", self.llava.config), self.template)
        else:
            prompt = image_and(question.options_after, self.llava.config)
        ids, full = (
            tokenizer_image_token(text, self.tokenizer, return_tensors="pt") for text in (prompt, f"{prompt} {option}.")
        )
        if len(full) <= len(ids):
            raise UmedError(
                f"option {option!r} of a question adds no token to its prompt: its likelihood cannot be computed."
            )
        return Continuation(image, ids, full)


def _server_writer(settings: AnswererSettings, model: Any) -> Any:
    from umed_plugin.model.server_answering import ServerWriter

    assert settings.server is not None
    return ServerWriter(settings.server, model, settings.server_adapters, settings.server_max_difference)


def image_key(path: str, reading: Reading | None) -> tuple[str, str]:
    """What questions must share to be about the same pixels: the file, and how it is read (such as the slice of a volume)."""
    return path, json.dumps(reading, sort_keys=True)


def image_and(question: str, config: Any) -> str:
    """A question behind the image token, as training and stock LLaVA write it."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

    image = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
    return f"{image}\n{question}"


def prompt_ids(question: str, template: str, tokenizer: Any, config: Any) -> Any:
    """Token ids [L] of a question about an image, with LLaVA's image token, as training and stock LLaVA write it."""
    from llava.mm_utils import tokenizer_image_token

    from umed_plugin.checkpoints.prompt_templates import question_prompt

    return tokenizer_image_token(question_prompt(image_and(question, config), template), tokenizer, return_tensors="pt")


class ModelImages:
    """Images as the model sees them, decoded each time or read from a cache.

    Args:
        checkpoint: for messages.
        processor: the checkpoint's image processor.
        config: the model's.
        folder: of the cache; None: no cache.
        most_gb: the cache's maximum size in GB.

    Raises:
        UmedError: the checkpoint sees an image as several tiles.
    """

    def __init__(
        self, checkpoint: Path | str, processor: Any, config: Any, folder: Path | str | None, most_gb: float
    ) -> None:
        from umed_plugin.data.images.cache import ImageCache

        self.processor, self.config = processor, config
        mode = getattr(config, "image_aspect_ratio", None) or "square"
        if mode not in ("pad", "square"):
            raise UmedError(
                f"{checkpoint}: sees an image as several tiles (image_aspect_ratio {mode!r} in config.json), as LLaVA-NeXT does. "
                "Only checkpoints that see one square per image ('pad' or 'square') can be evaluated."
            )
        self.mode = mode
        if (missing := missing_size(processor.to_dict())) is not None:
            raise UmedError(f"{checkpoint}: its tower's image processor can prepare no image: {missing}. {GIVE_SIZES}")
        if (fault := processor_fault(processor.to_dict(), mode)) is not None:
            warn(
                f"{checkpoint}: boxes are off, since the image processor of its vision tower differs from LLaVA's: {fault}."
            )
        self.cache = None if folder is None else ImageCache(folder, processor, mode, int(most_gb * 1e9))

    def pixels(self, paths: Sequence[str], readings: Sequence[Reading | None]) -> Any:
        """[B, 3, S, S] of B images."""
        import torch
        from llava.mm_utils import process_images

        if self.cache is None:
            opened = [_readable(_open, *pair) for pair in zip(paths, readings)]
            return process_images(opened, self.processor, self.config)
        return torch.stack([_readable(self.cache.pixels, *pair) for pair in zip(paths, readings)])


def _open(path: str, reading: Reading | None) -> Any:
    from umed_plugin.data.images import open_image
    from umed_plugin.data.images.stored import check_for_model

    image = open_image(path, None if reading is None else dict(reading))
    check_for_model(Path(path), image.width, image.height)
    return image


def _readable(read: Callable[..., Any], path: str, reading: Reading | None) -> Any:
    try:
        return read(path, reading)
    except (OSError, SyntaxError, ValueError) as error:
        raise UmedError(f"{path}: cannot be read as an image ({error}). Check the file, or --data-root.") from error
