"""A checkpoint loaded for answering, and the images as it sees them.

Images go through the loader of training (`umed_plugin.data.images`): what LLaVA reads by itself, and DICOM, NIfTI and 16-bit
files with the window and slice that a record names. Answers are in half precision on a GPU, as stock LLaVA gives them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.loading import STOCK_TEMPLATES
from umed_plugin.errors import UmedError
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.shared_prefix import Continuation, answer_greedily, continuation_losses

Reading = Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """What one question wants of a model.

    Attributes:
        image: path of the file, or folder of a DICOM series.
        text: the question, without image token; None: there is none.
        options: texts whose likelihood is asked for, as ``" {option}."`` behind ``options_after``.
        options_after: a bare text behind the image, without template; None: the question in its template.
        write: whether the question is to be answered in text.
        reading: arguments of `images.load_image` for a file that LLaVA cannot read by itself.
    """

    image: str
    text: str | None
    options: Sequence[str] = ()
    options_after: str | None = None
    write: bool = True
    reading: Reading | None = None


@dataclass(frozen=True)
class Answer:
    """What a model gave: its text (empty if none was asked for), and each option's mean cross-entropy in nats."""

    text: str
    losses: list[float]


class Answerer:
    """A loaded checkpoint.

    Args:
        checkpoint: a full LLaVA checkpoint, UMed or not, or a LoRA folder over ``base``.
        base: of a LoRA folder.
        template: of prompts; None: the one that ``templates`` names for the checkpoint's family.
        templates: model_type -> template.
        device: ``cuda`` (float16) where there is one, else ``cpu`` (float32).
        image_cache: folder that keeps images decoded and resized.
        image_cache_gb: most that it may hold, in GB.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        base: Path | str | None = None,
        template: str | None = None,
        templates: Mapping[str, str] = STOCK_TEMPLATES,
        device: str | None = None,
        image_cache: Path | str | None = None,
        image_cache_gb: float = 20.0,
        max_new_tokens: int = 128,
    ) -> None:
        import torch

        from umed_plugin.checkpoints.loading import load_checkpoint
        from umed_plugin.model.forward import base_llava

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # Stock LLaVA answers in half precision, which a CPU cannot compute.
        dtype = torch.float32 if device == "cpu" else torch.float16
        self.tokenizer, self.model, self.processor = load_checkpoint(checkpoint, base, device, dtype)
        self.llava = base_llava(self.model)
        self.template = template or templates[self.llava.config.model_type]
        self.max_new_tokens = max_new_tokens
        self._device = device
        self._states = [checkpoint_state(folder) for folder in (checkpoint, base) if folder is not None]
        self.seen = Seen(checkpoint, self.processor, self.llava.config, image_cache, image_cache_gb)

    def settings(self) -> dict[str, Any]:
        """What answers depend on, of the checkpoint and how it is asked; not where it lies, as folders may be moved."""
        asked = {"template": self.template, "device": self._device, "max_new_tokens": self.max_new_tokens}
        return {"weights": self._states, **asked}

    def scorer(self, dialect: BoxDialect = LLAVA) -> Scorer:
        """What scoring this checkpoint's answers needs to know of it."""
        tower = self.llava.get_vision_tower().config
        return Scorer(self.seen.mode, tower.image_size, tower.patch_size, dialect)

    def features(self, paths: Sequence[str], readings: Sequence[Reading | None]) -> Any:
        """[B, patches, D] of the vision tower for B images."""
        import torch

        from umed_plugin.model.forward import encode_images

        with torch.no_grad():
            return encode_images(self.model, self.seen.pixels(paths, readings))

    def prompt_ids(self, question: str) -> Any:
        """Token ids [L] of a question in its template, with the image token."""
        return prompt_ids(question, self.template, self.tokenizer, self.llava.config)

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer a batch; questions about one image share it, wherever they stand in the batch."""
        from umed_plugin.model.forward import decode_answers

        images = list(dict.fromkeys(_image_key(ask) for ask in asks))
        first = {_image_key(ask): ask for ask in reversed(asks)}
        features = self.features([path for path, _ in images], [first[key].reading for key in images])
        place = [images.index(_image_key(ask)) for ask in asks]

        texts = [""] * len(asks)
        written = [index for index, ask in enumerate(asks) if ask.text is not None and ask.write]
        if written:
            used = sorted({place[index] for index in written})
            ids = [self.prompt_ids(asks[index].text or "") for index in written]
            where = [used.index(place[index]) for index in written]
            limit, eos = self.max_new_tokens, self.tokenizer.eos_token_id
            candidates = answer_greedily(self.model, features[used], where, ids, limit, eos)
            for index, text in zip(written, decode_answers(self.tokenizer, candidates)):
                texts[index] = text
        losses = self._losses(asks, place, features)
        return [Answer(text, values) for text, values in zip(texts, losses)]

    def _losses(self, asks: Sequence[Ask], place: Sequence[int], features: Any) -> list[list[float]]:
        # Bare prompts and those in a template differ before the image.
        losses: list[list[float]] = [[] for _ in asks]
        for bare in (False, True):
            asked = [
                (index, self._continuation(place[index], ask, option))
                for index, ask in enumerate(asks)
                if bare == (ask.options_after is not None)
                for option in ask.options
            ]
            if asked:
                for (index, _), loss in zip(
                    asked, continuation_losses(self.model, features, [one for _, one in asked])
                ):
                    losses[index].append(loss)
        return losses

    def _continuation(self, image: int, ask: Ask, option: str) -> Continuation:
        from llava.mm_utils import tokenizer_image_token

        from umed_plugin.checkpoints.prompt_templates import question_prompt

        if ask.options_after is None:
            prompt = question_prompt(image_and(ask.text or "", self.llava.config), self.template)
        else:
            prompt = image_and(ask.options_after, self.llava.config)
        ids, full = (
            tokenizer_image_token(text, self.tokenizer, return_tensors="pt") for text in (prompt, f"{prompt} {option}.")
        )
        if len(full) <= len(ids):
            raise UmedError(
                f"option {option!r} of a question has no tokens of its own: its likelihood cannot be asked."
            )
        return Continuation(image, ids, full)


def _image_key(ask: Ask) -> tuple[str, str]:
    return ask.image, json.dumps(ask.reading, sort_keys=True)


def image_and(question: str, config: Any) -> str:
    """A question behind the image token, as training and stock LLaVA write it."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

    image = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
    return f"{image}\n{question}"


def prompt_ids(question: str, template: str, tokenizer: Any, config: Any) -> Any:
    """Token ids [L] of a question about an image, with LLaVA's image token in it, as training and stock LLaVA write it."""
    from llava.mm_utils import tokenizer_image_token

    from umed_plugin.checkpoints.prompt_templates import question_prompt

    return tokenizer_image_token(question_prompt(image_and(question, config), template), tokenizer, return_tensors="pt")


class Seen:
    """Images as the model sees them, decoded each time or through a cache."""

    def __init__(
        self, checkpoint: Path | str, processor: Any, config: Any, folder: Path | str | None, most_gb: float
    ) -> None:
        from umed_plugin.data.images.cache import ImageCache

        self.processor, self.config = processor, config
        stated = getattr(config, "image_aspect_ratio", None) or "square"
        if stated not in ("pad", "square"):
            raise UmedError(
                f"{checkpoint}: sees an image as several (image_aspect_ratio {stated!r} in config.json), as LLaVA-NeXT does. "
                "What can be evaluated: checkpoints of one square per image, 'pad' or 'square'."
            )
        self.mode = stated
        self.cache = None if folder is None else ImageCache(folder, processor, stated, int(most_gb * 1e9))

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

    return open_image(path, None if reading is None else dict(reading))


def _readable(read: Callable[..., Any], path: str, reading: Reading | None) -> Any:
    try:
        return read(path, reading)
    except (OSError, SyntaxError, ValueError) as error:
        raise UmedError(f"{path}: cannot be read as an image ({error}). Check the file, or --data-root.") from error


def checkpoint_state(checkpoint: Path | str) -> str:
    """A hash that changes with the checkpoint's configuration and with size or time of its weight files."""
    found = hashlib.sha256()
    for file in sorted(Path(checkpoint).iterdir()):
        if file.name in ("config.json", "adapter_config.json"):
            found.update(file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            status = file.stat()
            found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()[:16]
