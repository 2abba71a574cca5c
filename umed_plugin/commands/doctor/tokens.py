"""The tokenizer beside the embeddings: tokens without a row, rows without a token, and the ids that end and pad."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from umed_plugin.checkpoints.loading import FAMILIES
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.configuration import EMBEDDING, is_transformers_form
from umed_plugin.commands.doctor.contents import FULL, Contents, read_object
from umed_plugin.commands.doctor.findings import Finding, JsonChange
from umed_plugin.commands.doctor.identity import stock_template

PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"  # llava.constants
_END_OF_ANSWER = "</s>"  # of LLaVA's templates, but for the one of MPT


def check_tokens(contents: Contents) -> Iterator[Finding]:
    """Whether every token that LLaVA feeds or waits for is one that the model was trained with."""
    config = contents.config
    if contents.kind != FULL or is_transformers_form(config) or config.get("model_type") not in FAMILIES:
        return
    if not (contents.path / "tokenizer.model").is_file():
        found = "tokenizer.json alone" if (contents.path / "tokenizer.json").is_file() else "no tokenizer file"
        yield finding("tokenizer-missing", f"{found}, and no tokenizer.model", str(contents.path))
        return
    try:
        tokenizer = _load(contents)
    # What a broken file makes of the library's code is of no kind in particular.
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
        yield finding("padding-token", f"pad_token_id is {pad}, and vocab_size {rows}", where, change, token=unknown)


def _several_questions(contents: Contents) -> Iterator[Finding]:
    """LLaVA counts the tokens of each round by itself, where a legacy tokenizer puts a space that others do not."""
    file = contents.path / "tokenizer_config.json"
    if "llava_v1" in stock_template(contents) and read_object(file).get("legacy") is False:
        yield finding("questions-masked", "legacy is false, and the template llava_v1", f"{file}: legacy")


def _load(contents: Contents) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer

    # Without a class of its own the automatic choice would need LLaVA's configuration classes.
    named = "tokenizer_class" in read_object(contents.path / "tokenizer_config.json")
    if not named:
        return LlamaTokenizer.from_pretrained(contents.path)
    return AutoTokenizer.from_pretrained(contents.path, use_fast=False, trust_remote_code=False)


def _rows(contents: Contents, tokenizer: Any) -> Iterator[Finding]:
    """LLaVA adds the tokens that config.json asks for and makes as many rows as there are tokens."""
    config, rows = contents.config, contents.weights[EMBEDDING].shape[0]
    known = set(tokenizer.get_vocab())
    where = f"{EMBEDDING} and tokenizer of {contents.path}"
    asked = [PATCH] if config.get("mm_use_im_patch_token", True) else []
    asked += [START, END] if config.get("mm_use_im_start_end") else []
    added = [token for token in asked if token not in known]
    count = len(tokenizer) + len(added)
    if count > rows and added == [PATCH] and count == rows + 1 and "mm_use_im_patch_token" not in config:
        change = contents.configures(mm_use_im_patch_token=False)
        found = f"mm_use_im_patch_token is not set, and the embeddings have {rows} rows for {len(tokenizer)} tokens"
        yield finding("image-patch-token", found, f"{contents.config_file}: mm_use_im_patch_token", change)
    elif count > rows:
        beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows] + added
        found = f"{count} tokens, {rows} rows: none for {', '.join(sorted(beyond)[:5])}"
        yield finding("tokens-without-rows", found, where)
    elif count < rows:
        yield finding("rows-without-tokens", f"{rows} rows, {count} tokens", where)


def _end(contents: Contents, tokenizer: Any) -> Iterator[Finding]:
    end = tokenizer.eos_token_id
    files = {
        contents.config_file: contents.config,
        contents.path / "generation_config.json": contents.generation_config,
    }
    for file, values in files.items():
        said = values.get("eos_token_id", end)
        if said == end or (isinstance(said, list) and end in said):
            continue
        sure = tokenizer.convert_tokens_to_ids(_END_OF_ANSWER) == end
        change = JsonChange(file, {"eos_token_id": end}) if sure else None
        found = f"eos_token_id is {said}, the tokenizer's end {end} ({tokenizer.eos_token!r})"
        yield finding("end-token", found, f"{file}: eos_token_id", change, token=end, files=file.name)
