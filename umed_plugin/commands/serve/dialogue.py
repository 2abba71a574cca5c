"""Answers about a picture: greedy decoding, streamed token by token, with cached image features and KV caches.

The image features of the latest pictures and the KV caches of the latest conversations are kept, so a follow-up question costs
only its own tokens. The prompt is the one of training, stock LLaVA and `umed evaluate`; earlier questions and answers are added
the way LLaVA adds them.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from torch import Tensor

from umed_plugin.checkpoints.folder import UMED_TEMPLATES
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.precision import answering_precision, torch_dtype
from umed_plugin.checkpoints.prompt_templates import conversation_template, warn_of_other_family
from umed_plugin.commands.serve.answer import SINK_RATIO, Answer, attended_words
from umed_plugin.commands.serve.box_places import box_places, boxes_on_picture
from umed_plugin.data.leaks import thumbprint
from umed_plugin.data.similar import Bank, Case, make_bank
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import parse_boxes
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.model.answerer import ModelImages, image_and
from umed_plugin.model.forward import IMAGE_TOKEN_INDEX, base_llava, embed_prompts, encode_images, prefill
from umed_plugin.model.kv_cache import PreallocatedCache
from umed_plugin.model.sampling import check_finite

if TYPE_CHECKING:
    from PIL.Image import Image

Turn = tuple[str, str]

MOST_PICTURES = 64  # with cached features: about 1 MB each for a 336-pixel tower
MOST_CONVERSATIONS = 2  # with a KV cache: about 0.5 GB each for a 13B Llama
ROOM_TO_GO_ON = 512  # free columns in a KV cache for follow-up questions


@dataclass
class _Held:
    """The KV cache of a conversation.

    Attributes:
        columns: what each cached column stands for: a token id, or the image token for each patch.
        fits: number of columns that the cache has room for.
    """

    cache: PreallocatedCache
    columns: list[int]
    fits: int


class Dialogue:
    """A checkpoint that answers questions about pictures. Not thread-safe: one call at a time.

    Args:
        checkpoint: a full checkpoint, or a LoRA folder over ``base``.
        template: prompt template; by default the umed template of the checkpoint's family.
        most_tokens: maximum number of tokens of an answer.
        dtype: of the weights; None: as `umed evaluate` chooses.

    Raises:
        UmedError: the checkpoint cannot be loaded, or uses an image mode without box support, such as `anyres`.
    """

    def __init__(
        self,
        checkpoint: Path,
        base: Optional[Path] = None,
        template: Optional[str] = None,
        most_tokens: int = 256,
        dtype: Optional[str] = None,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = torch_dtype(answering_precision(checkpoint, base, device, dtype))
        self.tokenizer, self.model, self.processor = load_checkpoint(checkpoint, base, device, precision)
        self.llava = base_llava(self.model)
        self.mode = ModelImages(checkpoint, self.processor, self.llava.config, None, 0).mode
        self.template = template or UMED_TEMPLATES[self.llava.config.model_type]
        conversation_template(self.template)  # raises for an unknown name
        warn_of_other_family(template, self.llava.config.model_type)
        self.most_tokens = most_tokens
        self._similar: Optional[tuple[Bank, int]] = None
        self._said: OrderedDict[Hashable, str] = OrderedDict()
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()

    @torch.no_grad()
    def look_up(self, count: int, source: str) -> None:
        """From now on, begin each conversation with what the ``count`` most similar training studies of ``source`` show.

        Args:
            source: a recipe, or a JSON of records.

        Raises:
            UmedError: it has no training studies, or an image cannot be read.
        """
        from llava.mm_utils import process_images

        from umed_plugin.data.images import open_image
        from umed_plugin.evaluation.benchmarks.recipe import recipe_benchmark

        def encode(cases: Sequence[Case]) -> Any:
            pixels = process_images(
                [open_image(case.path, case.reading) for case in cases],
                self.processor,
                self.llava.config,
            )
            return encode_images(self.model, pixels).float().mean(dim=1).cpu().numpy()

        studies = recipe_benchmark(source, image_aspect_ratio=self.mode, render=False, pseudo_boxes=True)
        with tempfile.TemporaryDirectory(prefix="umed-serve-") as work:
            questions = studies.questions(Path(work), "train", Path(work))
            placed = [{**question.about["record"], "image": question.image} for question in questions]
            self._similar = make_bank(placed, "", encode), count

    def _before(self, key: Hashable, picture: Image, features: Tensor) -> str:
        """What is said before the first question about a picture. Its patient is not known; near-duplicates are left out."""
        if self._similar is None:
            return ""
        if key not in self._said:
            bank, count = self._similar
            feature = features[0].float().mean(dim=0).cpu().numpy()
            self._said[key] = bank.said(Case("", ""), feature, thumbprint(np.asarray(picture)), count)
        return str(_latest(self._said, key, MOST_PICTURES))

    @torch.no_grad()
    def answer(
        self, key: Hashable, picture: Image, turns: Sequence[Turn], question: str, tell: Callable[[str], None]
    ) -> Answer:
        """Answer a question about a picture by greedy decoding.

        Args:
            key: identifies the picture in the caches.
            picture: an RGB image.
            turns: earlier (question, answer) pairs about it.
            question: without the image token.
            tell: called with the text so far after each token; an exception from it stops the answer.

        Raises:
            UmedError: the question does not fit into the model's context.
        """
        features = self._image_features(key, picture)
        turns = [turn for turn in turns if turn[1].strip()]
        before = self._before(key, picture, features)
        ids, forgotten = self._fitting_prompt(turns, question, features.shape[1], before)
        token_ids = self._generated(key, ids, features, tell)
        text = self._shown(token_ids).split(self._stop())[0].strip()
        tower = self.llava.get_vision_tower().config
        geometry = ImageGeometry(picture.width, picture.height, self.mode, tower.image_size, tower.patch_size)
        boxes = boxes_on_picture(parse_boxes(text), geometry)
        return Answer(
            text, boxes, box_places(text), forgotten, self._cut(token_ids), ids, token_ids, features, geometry
        )

    def attention(self, answer: Answer, mask_sinks: bool = False) -> dict[str, Any]:
        """The attention of each word of an answer on the image patches (`attended_words`)."""
        return attended_words(self.model, self.tokenizer, answer, SINK_RATIO if mask_sinks else 0.0)

    def forget(self, belongs: Callable[[Any], bool]) -> None:
        """Drop the features and KV caches of all keys for which ``belongs`` is true. One call at a time, like all methods."""
        for kept in (self._features, self._held, self._said):
            for key in [key for key in kept if belongs(key)]:
                del kept[key]

    def _image_features(self, key: Hashable, picture: Image) -> Tensor:
        """Image features [1, P, D] of a picture, cached for the next question."""
        from llava.mm_utils import process_images

        if key not in self._features:
            pixels = process_images([picture], self.processor, self.llava.config)
            self._features[key] = encode_images(self.model, pixels)
        return _latest(self._features, key, MOST_PICTURES)

    def _fitting_prompt(
        self, turns: Sequence[Turn], question: str, patches: int, before: str = ""
    ) -> tuple[Tensor, int]:
        """Token ids [L] of the prompt, and the number of earliest turns that were left out so that it fits."""
        most = self.llava.config.max_position_embeddings - self.most_tokens
        for forgotten in range(len(turns) + 1):
            ids = self._prompt(turns[forgotten:], question, before)
            if len(ids) - 1 + patches <= most:
                return ids, forgotten
        raise UmedError(
            f"The question is too long: {len(ids) - 1} tokens. This model has room for {most - patches}. Shorten it."
        )

    def _prompt(self, turns: Sequence[Turn], question: str, before: str = "") -> Tensor:
        from llava.constants import DEFAULT_IMAGE_TOKEN
        from llava.mm_utils import tokenizer_image_token

        conversation = conversation_template(self.template)
        parts = [part.replace(DEFAULT_IMAGE_TOKEN, "") for turn in [*turns, (question,)] for part in turn]
        for number, part in enumerate(parts):
            message = part if number else image_and(before + part, self.llava.config)
            conversation.append_message(conversation.roles[number % 2], message)
        conversation.append_message(conversation.roles[1], None)
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")

    def _generated(self, key: Hashable, ids: Tensor, features: Tensor, tell: Callable[[str], None]) -> list[int]:
        """The answer's token ids, including EOS if it was generated."""
        prompts = embed_prompts(self.model, [ids], features)
        # The cache already holds the prefix shared with the previous prompt; prefill computes only the rest.
        held = self._cache_for(key, ids, features.shape[1])
        logits = prefill(self.model, prompts, held.cache).logits
        check_finite(logits[:, -1])
        held.columns = _columns(ids, features.shape[1])
        token_ids: list[int] = []
        while True:
            token_ids.append(int(logits[0, -1].argmax()))
            if self._has_ended(token_ids):
                return token_ids
            tell(self._shown(token_ids))
            if len(token_ids) == self.most_tokens:
                return token_ids
            logits = self._next_logits(token_ids[-1], held)

    def _has_ended(self, token_ids: Sequence[int]) -> bool:
        return token_ids[-1] == self.tokenizer.eos_token_id or self._stop() in self._shown(token_ids)

    def _cut(self, token_ids: Sequence[int]) -> Optional[int]:
        return None if self._has_ended(token_ids) else len(token_ids)

    def _next_logits(self, token: int, held: _Held) -> Tensor:
        position = len(held.columns)
        device = self.llava.get_input_embeddings().weight.device
        inputs = {
            "inputs_embeds": self.llava.get_input_embeddings()(torch.tensor([[token]], device=device)),
            "attention_mask": torch.ones(1, position + 1, dtype=torch.long, device=device),
            "position_ids": torch.tensor([[position]], device=device),
        }
        logits = self.model(**inputs, past_key_values=held.cache, use_cache=True, return_dict=True).logits
        held.columns.append(token)
        return logits

    def _cache_for(self, key: Hashable, ids: Tensor, features: int) -> _Held:
        """A KV cache that holds the prefix shared with the previous prompt of this picture, with room for the rest."""
        columns = _columns(ids, features)
        held = self._held.get(key)
        if held is None or len(columns) + self.most_tokens > held.fits:
            room = self.most_tokens + ROOM_TO_GO_ON
            self._held[key] = _Held(PreallocatedCache(room), [], len(columns) + room)
        else:
            # The last column is always computed: it gives the first logits.
            shared = _shared_prefix(held.columns, columns[:-1])
            held.cache.truncate(shared)
            held.columns = held.columns[:shared]
        return _latest(self._held, key, MOST_CONVERSATIONS)

    def _stop(self) -> str:
        """The separator that ends an answer besides EOS, if the template has one as text; else NUL, which no text contains."""
        from llava.conversation import SeparatorStyle

        conversation = conversation_template(self.template)
        separator = conversation.sep if conversation.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT) else ""
        return separator or "\0"

    def _shown(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def _columns(ids: Tensor, features: int) -> list[int]:
    """What each column of an embedded prompt stands for: a token id, or the image token for each feature of the image."""
    columns: list[int] = []
    for token in ids.tolist():
        columns += [token] * (features if token == IMAGE_TOKEN_INDEX else 1)
    return columns


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (column, other) in enumerate(zip(first, second)):
        if column != other:
            return index
    return min(len(first), len(second))


def _latest(kept: OrderedDict[Hashable, Any], key: Hashable, most: int) -> Any:
    """Return the entry and mark it as the most recently used; drop the oldest entries beyond ``most``."""
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]
