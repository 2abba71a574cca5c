"""Which tokens of an answer name an abnormality, also where a name spans several word pieces.

The text is decoded token by token, names are searched in it, and the characters of a name lead back to its tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_names
from umed_plugin.grounding.phrases import phrase_spans
from umed_plugin.grounding.terms import ClassNames, find_terms
from umed_plugin.model.forward import Candidates

_SPACE_MARK = "\u2581"  # sentencepiece writes it for a space
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece writes it for a byte of a character that it does not know


def lesion_naming_tokens(
    tokenizer: Any, candidates: Candidates, records: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """For each of N answers the indices 0..T-1 of the tokens that name a lesion of its record; ``records`` has N entries."""
    return [record_tokens(tokenizer, ids, record) for ids, record in zip(candidates.answers(), records)]


def record_tokens(tokenizer: Any, token_ids: Sequence[int], record: Mapping[str, Any]) -> list[int]:
    """Indices of the answer tokens that name a lesion of the record; of a phrase, the tokens that repeat its words."""
    if asks_for_names(record):
        return naming_tokens(tokenizer, token_ids, record["terms"], set(record["objects"]["ref"]))
    text, ends = decode_with_offsets(tokenizer, token_ids)
    return tokens_in_spans(ends, phrase_spans(text, record["phrase"]))


def naming_tokens(tokenizer: Any, token_ids: Sequence[int], terms: ClassNames, classes: Collection[str]) -> list[int]:
    """Indices of the answer tokens that name one of ``classes``.

    Args:
        tokenizer: a sentencepiece or byte-level BPE tokenizer.
        token_ids: one answer.
        terms: class -> plain name and synonyms, of all classes: a longer name of another class does not count as this one's.
        classes: the classes that count.
    """
    text, ends = decode_with_offsets(tokenizer, token_ids)
    spans = [(start, end) for start, end, cls in find_terms(text, terms) if cls in classes]
    return tokens_in_spans(ends, spans)


def decode_with_offsets(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of one answer, special tokens included, and the offset in it where each token ends."""
    text, ends = "", []
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a piece may end inside a character
    for piece in _piece_bytes(tokenizer, token_ids):
        text += characters.decode(piece)
        ends.append(len(text))
    return text, ends


def tokens_in_spans(ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Indices of the tokens that share a character with one of the spans ``[start, end)`` of their text."""
    starts = [0, *ends[:-1]]
    return [t for t, (a, b) in enumerate(zip(starts, ends)) if any(a < end and b > start for start, end in spans)]


def _piece_bytes(tokenizer: Any, token_ids: Sequence[int]) -> list[bytes]:
    """The bytes of the text that each token stands for, with the space before a word (``decode`` drops it at the start)."""
    pieces = tokenizer.convert_ids_to_tokens(list(token_ids))
    if tokenizer.convert_tokens_to_ids(_SPACE_MARK) not in (None, tokenizer.unk_token_id):
        return [
            bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE_MARK, " ").encode()
            for byte, piece in zip(map(_BYTE_PIECE.fullmatch, pieces), pieces)
        ]
    byte_of = byte_level_alphabet()
    return [
        bytes(byte_of[c] for c in piece) if all(c in byte_of for c in piece) else piece.encode() for piece in pieces
    ]


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level BPE: printable bytes stand for themselves, the others for characters from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {**{chr(byte): byte for byte in printed}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
