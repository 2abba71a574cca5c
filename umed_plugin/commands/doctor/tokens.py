"""Checks of the tokenizer against the embeddings: tokens without a row, rows without a token, EOS and padding ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from umed_plugin.checkpoints.folder import BYTE_PAIR_FILES, FAMILIES
from umed_plugin.checkpoints.utf8_paths import in_utf8
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.configuration import EMBEDDING, is_transformers_form
from umed_plugin.commands.doctor.contents import FULL, Contents, read_object
from umed_plugin.commands.doctor.findings import Finding, JsonChange
from umed_plugin.commands.doctor.identity import stock_template

PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"  # llava.constants
_END_OF_ANSWER = "</s>"  # in all LLaVA templates except MPT's


def check_tokens(contents: Contents) -> Iterator[Finding]:
    """Check that every token that LLaVA feeds or stops at is one that the model was trained with."""
    config = contents.config
    if contents.kind != FULL or is_transformers_form(config) or config.get("model_type") not in FAMILIES:
        return
    if missing := _missing(contents):
        found = f"no {' and no '.join(missing)}"
        if (contents.path / "tokenizer.json").is_file():
            found += ", only tokenizer.json"
        yield finding("tokenizer-missing", found, str(contents.path))
        return
    try:
        tokenizer = _load(contents)
    # A broken file can raise any exception in the library's code.
    except Exception as error:  # noqa: BLE001
        yield finding("tokenizer-unreadable", f"{type(error).__name__}: {error}", str(contents.path))
        return
    if EMBEDDING in contents.weights and contents.weights[EMBEDDING].shape:
        yield from _rows(contents, tokenizer)
    yield from _end(contents, tokenizer)
    yield from _several_questions(contents)
    rows, pad = config.get("vocab_size"), config.get("pad_token_id")
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        unknown = tokenizer.unk_token_id or 0
        where = f"{contents.config_file}: pad_token_id"
        change = contents.configures(pad_token_id=unknown)
        yield finding("padding-token", f"pad_token_id is {pad}, but vocab_size is {rows}", where, change, token=unknown)


def _missing(contents: Contents) -> list[str]:
    """The files that LLaVA's slow tokenizer would read and that are not there."""
    named = read_object(contents.path / "tokenizer_config.json").get("tokenizer_class")
    needed = BYTE_PAIR_FILES if named == "GPT2Tokenizer" else ("tokenizer.model",)
    return [name for name in needed if not (contents.path / name).is_file()]


def _several_questions(contents: Contents) -> Iterator[Finding]:
    """LLaVA counts the tokens of each round separately; a legacy tokenizer adds a space there that others do not add."""
    file = contents.path / "tokenizer_config.json"
    if "llava_v1" in stock_template(contents) and read_object(file).get("legacy") is False:
        yield finding("questions-masked", "legacy is false, and the template is llava_v1", f"{file}: legacy")


def _load(contents: Contents) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer

    # Without tokenizer_class, AutoTokenizer would need LLaVA's configuration classes.
    named = "tokenizer_class" in read_object(contents.path / "tokenizer_config.json")
    with in_utf8(contents.path) as path:
        if not named:
            return LlamaTokenizer.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, use_fast=False, trust_remote_code=False)


def _rows(contents: Contents, tokenizer: Any) -> Iterator[Finding]:
    """LLaVA adds the tokens that config.json requests, and resizes the embeddings to the number of tokens."""
    config, rows = contents.config, contents.weights[EMBEDDING].shape[0]
    known = set(tokenizer.get_vocab())
    where = f"{EMBEDDING} and tokenizer of {contents.path}"
    requested = [PATCH] if config.get("mm_use_im_patch_token", True) else []
    requested += [START, END] if config.get("mm_use_im_start_end") else []
    added = [token for token in requested if token not in known]
    count = len(tokenizer) + len(added)
    if count > rows and added == [PATCH] and count == rows + 1 and "mm_use_im_patch_token" not in config:
        change = contents.configures(mm_use_im_patch_token=False)
        found = f"mm_use_im_patch_token is not set, and the embeddings have {rows} rows for {len(tokenizer)} tokens"
        yield finding("image-patch-token", found, f"{contents.config_file}: mm_use_im_patch_token", change)
    elif count > rows:
        beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows] + added
        found = f"{count} tokens, but {rows} rows; no rows for {', '.join(sorted(beyond)[:5])}"
        yield finding("tokens-without-rows", found, where)
    elif count < rows:
        yield finding("rows-without-tokens", f"{rows} rows, but {count} tokens", where)


def _end(contents: Contents, tokenizer: Any) -> Iterator[Finding]:
    end = tokenizer.eos_token_id
    files = {
        contents.config_file: contents.config,
        contents.path / "generation_config.json": contents.generation_config,
    }
    for file, values in files.items():
        # Without the key in config.json, its class has one; a generation_config.json without it ends no answer.
        needed = file != contents.config_file and bool(values)
        value = values.get("eos_token_id", None if needed else end)
        if value == end or (isinstance(value, list) and end in value):
            continue
        is_standard = tokenizer.convert_tokens_to_ids(_END_OF_ANSWER) == end
        agreed = value is None and contents.config.get("eos_token_id") == end
        change = JsonChange(file, {"eos_token_id": end}) if is_standard or agreed else None
        told = "not set" if value is None else value
        found = f"eos_token_id is {told}, but the tokenizer's end token is {end} ({tokenizer.eos_token!r})"
        yield finding("end-token", found, f"{file}: eos_token_id", change, token=end, files=file.name)
