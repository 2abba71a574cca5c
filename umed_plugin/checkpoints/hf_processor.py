"""Tokenizer, chat template and image processor: from LLaVA's form to transformers' and back.

LLaVA's tokenizer does not know ``<image>``; transformers' must. It becomes the last token. ``tokenizer.json`` is made from
``tokenizer.model`` with the space rules of LLaVA's slow tokenizer, and its ids are compared with that tokenizer's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.chat_template import END, IMAGE, START, jinja_template
from umed_plugin.checkpoints.folder import read_object
from umed_plugin.checkpoints.prompt_templates import question_prompt
from umed_plugin.checkpoints.tokenizers import load_tokenizer
from umed_plugin.errors import UmedError
from umed_plugin.files import write_json

_SPACE = "\u2581"  # sentencepiece's space
# Keys of tokenizer_config.json that a slow Llama tokenizer reads.
_TOKENIZER_KEYS = (
    "add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "pad_token", "clean_up_tokenization_spaces",
    "legacy", "model_max_length", "sp_model_kwargs", "spaces_between_special_tokens", "use_default_system_prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that the converted model needs.

    Attributes:
        image: id of ``<image>``; equals the number of LLaVA's own tokens.
        pad: id of the padding token.
    """

    image: int
    pad: int


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file.

    Raises:
        UmedError: the file is something else.
    """
    return read_object(file) if file.is_file() else {}


def sentencepiece_file(checkpoint: Path) -> Path:
    """``tokenizer.model`` of a checkpoint.

    Raises:
        UmedError: it has none.
    """
    file = checkpoint / "tokenizer.model"
    if not file.is_file():
        raise UmedError(
            f"{checkpoint}: has no tokenizer.model, the sentencepiece vocabulary that LLaVA's tokenizer reads (newer "
            "transformers do not save it). Copy it there from the checkpoint from which this one was made."
        )
    return file


def write_tokenizer(checkpoint: Path, config: dict[str, Any], folder: Path, template: str) -> Vocabulary:
    """Write tokenizer and chat template in transformers' form.

    Args:
        checkpoint: LLaVA's, with ``tokenizer.model``.
        config: its ``config.json``.
        folder: to write to.
        template: name of the conversation template.

    Raises:
        UmedError: there is no ``tokenizer.model``, the tokenizer is code of the checkpoint, or the result does not tokenize as
            LLaVA does.
    """
    source = sentencepiece_file(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    if config.get("mm_use_im_patch_token", True):  # LLaVA's loader adds the tokens that the configuration requests
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    marked = START + IMAGE + END if config.get("mm_use_im_start_end") else IMAGE
    if marked != IMAGE:
        tokenizer.add_tokens([START, END], special_tokens=True)
    old = read_json(checkpoint / "tokenizer_config.json")
    legacy = old.get("legacy") in (None, True)  # without the key, a tokenizer is legacy
    added = {int(key): token for key, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = Vocabulary(len(tokenizer), _pad_id(tokenizer))
    tokens = [_added_token(key, token.content, token.special) for key, token in sorted(added.items())]
    tokens.append(_added_token(vocabulary.image, IMAGE, special=True))
    gap = "" if legacy else " "
    image = IMAGE + gap if marked == IMAGE else START + IMAGE + _gap_before_end(tokenizer) + END
    text = jinja_template(template, gap=gap, image=image)
    shutil.copy2(source, folder / source.name)
    write_json(folder / "tokenizer.json", _tokenizer_json(source, tokens, tokenizer, legacy), indent=2)
    new = {key: old[key] for key in _TOKENIZER_KEYS if key in old}
    new.update(
        tokenizer_class="LlamaTokenizer", processor_class="LlavaProcessor", legacy=legacy, padding_side="left",
        bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token, unk_token=tokenizer.unk_token,
        pad_token=tokenizer.convert_ids_to_tokens(vocabulary.pad), chat_template=text,
        added_tokens_decoder={str(token.pop("id")): token for token in [dict(token) for token in tokens]},
    )  # fmt: skip
    write_json(folder / "tokenizer_config.json", new, indent=2)
    write_json(folder / "chat_template.json", {"chat_template": text}, indent=2)
    _compare(tokenizer, folder, text, template, marked)
    return vocabulary


def _pad_id(tokenizer: Any) -> int:
    """LLaVA pads with UNK if a tokenizer has no padding token. Padding is masked, so no new token is needed."""
    pad = tokenizer.pad_token_id
    return tokenizer.unk_token_id if pad is None else pad


def _gap_before_end(tokenizer: Any) -> str:
    """The gap before a part of the prompt that begins with the end mark; not all tokenizers put a space there."""
    return "" if tokenizer(END, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(END)] else " "


def _added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **plain, "special": special}


def _tokenizer_json(source: Path, added: list[dict[str, Any]], tokenizer: Any, legacy: bool) -> dict[str, Any]:
    """``tokenizer.json``: the sentencepiece model's pieces and merges, with the slow tokenizer's space rules.

    A legacy slow tokenizer puts a space before each segment between special tokens, others only before the first segment.
    """
    from transformers import LlamaTokenizerFast

    with tempfile.TemporaryDirectory() as alone:  # a tokenizer.json in the same folder would be read instead
        shutil.copy2(source, alone)
        made = json.loads(LlamaTokenizerFast.from_pretrained(alone).backend_tokenizer.to_str())
    model = made["model"]
    model.pop("ignore_merges", None)  # unknown to older versions of tokenizers
    model.update(
        unk_token=tokenizer.unk_token,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    )
    bos = {"id": tokenizer.bos_token, "ids": [tokenizer.bos_token_id], "tokens": [tokenizer.bos_token]}
    single = [{"SpecialToken": {"id": bos["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos["id"], "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    first = {"type": "Metaspace", "replacement": _SPACE, "add_prefix_space": True, "prepend_scheme": "first"}
    return {
        **made,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if legacy else None,
        "pre_tokenizer": None if legacy else {**first, "split": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": {bos["id"]: bos}
        },
        "model": model,
    }  # fmt: skip


def _compare(tokenizer: Any, folder: Path, text: str, template: str, marked: str) -> None:
    """Refuse a result whose token ids for a question differ from LLaVA's."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token
    from transformers import PreTrainedTokenizerFast

    question = "Is anything abnormal? [0.12, 0.5]"
    ours = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=tokenizer.bos_token)
    chat = [{"role": "user", "content": f"{IMAGE}\n{question}"}]
    prompt = ours.apply_chat_template(chat, chat_template=text, tokenize=False, add_generation_prompt=True)
    ids = ours(prompt, add_special_tokens=False).input_ids
    expected = tokenizer_image_token(question_prompt(f"{marked}\n{question}", template), tokenizer)
    image_id = ours.convert_tokens_to_ids(IMAGE)
    expected = [image_id if index == IMAGE_TOKEN_INDEX else index for index in expected]
    if ids != expected:
        raise UmedError(
            f"{tokenizer.name_or_path}: its tokenizer cannot be written in transformers' form: the prompt {prompt!r} becomes "
            f"{ids}, but {expected} in LLaVA. Please report the checkpoint's name and tokenizer_config.json."
        )


def write_image_processor(tower: Path | str, config: dict[str, Any], folder: Path, patch_size: int) -> None:
    """Write the tower's image processor, with padding to a square if the checkpoint uses it, and ``processor_config.json``.

    Args:
        tower: folder or Hub name with ``preprocessor_config.json``.
        config: LLaVA's ``config.json``.
        folder: to write to.
        patch_size: of the tower, in pixels.
    """
    from transformers import CLIPImageProcessor

    values = CLIPImageProcessor.from_pretrained(tower).to_dict()
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    if config.get("image_aspect_ratio") == "pad":
        values.update(image_processor_type="LlavaImageProcessor", do_pad=True)
    else:
        values["image_processor_type"] = "CLIPImageProcessor"
    write_json(folder / "preprocessor_config.json", {**values, "processor_class": "LlavaProcessor"}, indent=2)
    strategy = "full" if config.get("mm_vision_select_feature", "patch") == "cls_patch" else "default"
    settings = {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1,
        "image_token": IMAGE,
    }
    write_json(folder / "processor_config.json", settings, indent=2)


def read_image_processor(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """The tower's image processor and LLaVA's ``image_aspect_ratio`` of a folder in transformers' form.

    Raises:
        UmedError: it has no image processor.
    """
    values = read_json(checkpoint / "preprocessor_config.json")
    values = values or read_json(checkpoint / "processor_config.json").get("image_processor", {})
    if not values:
        raise UmedError(
            f"{checkpoint}: has no image processor (preprocessor_config.json, or image_processor in processor_config.json). "
            "Copy it there from the model from which this one was made."
        )
    ratio = "pad" if values.get("do_pad") else "square"
    dropped = ("do_pad", "pad_size", "processor_class", "image_processor_type")
    values = {key: value for key, value in values.items() if key not in dropped}
    return {**values, "image_processor_type": "CLIPImageProcessor"}, ratio


def write_llava_tokenizer(checkpoint: Path, folder: Path, original: dict[str, Any], image_id: int) -> int:
    """Write the tokenizer as LLaVA reads it, without ``<image>``; return the number of embedding rows that it uses.

    ``<image>`` is removed if only padding follows it; otherwise it stays, which does not affect LLaVA.

    Args:
        checkpoint: in transformers' form.
        folder: to write to.
        original: ``tokenizer_config.json`` of the LLaVA checkpoint from which it was made; {} if unknown.
        image_id: id of ``<image>``.
    """
    shutil.copy2(sentencepiece_file(checkpoint), folder)
    settings = read_json(checkpoint / "tokenizer_config.json")
    added = settings.get("added_tokens_decoder")
    if added is None:
        listed = read_json(checkpoint / "tokenizer.json").get("added_tokens", [])
        added = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in listed}
    last = {key for key, token in added.items() if int(key) >= image_id}
    pad = settings.get("pad_token")
    pad = pad["content"] if isinstance(pad, dict) else pad
    removable = all(added[key]["content"] in (IMAGE, pad) for key in last)
    kept = {key: token for key, token in added.items() if not (removable and key in last)}
    config = original or {key: settings[key] for key in _TOKENIZER_KEYS if key in settings}
    if not original and pad in {added[key]["content"] for key in last}:
        config["pad_token"] = settings.get("unk_token")
    own = {"tokenizer_class": "LlamaTokenizer", "padding_side": "right", "added_tokens_decoder": kept}
    write_json(folder / "tokenizer_config.json", {**config, **own}, indent=2)
    return image_id if removable else max(map(int, added)) + 1
