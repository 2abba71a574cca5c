"""Packed rows: K answers behind one prompt in a single row, kept apart by a block mask.

A packed row is the prompt (padded left, L columns) followed by the tokens of the query's K answers. There is no padding
between answers, and the longest row has A answer columns. Each answer sees the prompt and itself, causally, and never another
answer. Its positions continue the prompt's. So the prompt is computed once, and a pass shrinks from K*(L + T) tokens to
L + K*T.

Every column has a segment: 0 is the prompt, 1..K are its answers, -1 is padding. Two things keep the answers apart:

- `umed_plugin.model.split_attention` splits the attention of a row. Training runs have it, with every kind of attention.
- `block_mask` turns segments and positions into a 4-D mask that is added to the attention scores. transformers 5 accepts such a
  mask; 4.36 does with `umed_plugin.patches.attention_mask`; flash attention does not.

`packing_fault` tests the model.

Shapes as in `umed_plugin.model.forward`, and R rows, S = L + A columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umed_plugin.errors import UmedError
from umed_plugin.model.split_attention import attends_split, describe_rows

PADDING = -1
PROMPT = 0


@dataclass(frozen=True)
class Columns:
    """What the columns of R rows hold.

    Attributes:
        segments: [R, S] 0 prompt, 1..K answer, -1 padding.
        positions: [R, S] position ids; 0 at padding.
    """

    segments: Tensor
    positions: Tensor

    @classmethod
    def of_prompts(cls, mask: Tensor) -> Columns:
        """Columns of prompts with the mask [R, L], padded left."""
        positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        return cls(torch.where(mask.bool(), PROMPT, PADDING), positions)

    def then(self, other: Columns) -> Columns:
        """These columns followed by others."""
        segments = torch.cat([self.segments, other.segments], dim=1)
        return Columns(segments, torch.cat([self.positions, other.positions], dim=1))

    def take_rows(self, rows: Tensor | slice) -> Columns:
        """The rows of an index."""
        return Columns(self.segments[rows], self.positions[rows])


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of N = Q*K answers stand in Q packed rows.

    Attributes:
        row: [N, 1] row of each answer.
        column: [N, T] column of each answer token; at padding the column of the answer's last token.
        before: [N, T] column whose output predicts the token: the one before it, or the prompt's last for a first token.
        columns: [Q, S] what all columns hold.
        prompt_columns: L.
    """

    row: Tensor
    column: Tensor
    before: Tensor
    columns: Columns
    prompt_columns: int

    def put(self, answers: Tensor, mask: Tensor) -> Tensor:
        """[Q, A] token ids of the rows behind the prompt, from [N, T] ids with their mask; 0 at padding."""
        tokens = _scatter(answers, mask, self.row, self.column, torch.zeros_like(self.columns.segments))
        return tokens[:, self.prompt_columns :]


def pack(prompt_mask: Tensor, answer_mask: Tensor) -> PackedRows:
    """Lay out N answers behind their Q prompts.

    Args:
        prompt_mask: [Q, L], padded left.
        answer_mask: [N, T], padded right; each answer has at least one token.
    """
    queries, prompt_columns = prompt_mask.shape
    answers, steps = answer_mask.shape
    device, each = prompt_mask.device, answers // queries
    lengths = answer_mask.sum(dim=1).view(queries, each)

    # An answer starts where the answers before it in the row end. Padding stays on the answer's last token: its index is
    # valid, and what is gathered there is masked later.
    first = prompt_columns + (lengths.cumsum(dim=1) - lengths).view(-1, 1)
    step = torch.arange(steps, device=device)
    column = first + torch.minimum(step, lengths.view(-1, 1) - 1)
    # The column on the left of an answer's first token belongs to the answer before it. The prompt's last column predicts it.
    before = torch.cat([torch.full_like(first, prompt_columns - 1), column[:, :-1]], dim=1)
    row = torch.arange(queries, device=device).repeat_interleave(each)[:, None]

    # Columns behind the prompt are padding until an answer is written there. Rows end at different columns, so padding may
    # remain on the right.
    behind = (queries, int(lengths.sum(dim=1).max()))
    empty = Columns(torch.full(behind, PADDING, device=device), torch.zeros(behind, dtype=torch.long, device=device))
    columns = Columns.of_prompts(prompt_mask).then(empty)
    segment = torch.arange(1, each + 1, device=device).repeat(queries)[:, None].expand_as(column)
    position = prompt_mask.long().sum(dim=1)[row] + step
    _scatter(segment, answer_mask, row, column, columns.segments)
    _scatter(position, answer_mask, row, column, columns.positions)
    return PackedRows(row, column, before, columns, prompt_columns)


def _scatter(values: Tensor, mask: Tensor, row: Tensor, column: Tensor, into: Tensor) -> Tensor:
    """Write the [N, T] values into ``into`` at their row and column where the mask is 1; returns ``into``."""
    kept = mask.bool()
    into[row.expand_as(column)[kept], column[kept]] = values[kept].to(into.dtype)
    return into


def block_mask(seeing: Columns, seen: Columns, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores: 0 where a column sees another, the most negative number elsewhere.

    A column sees its prompt and its own segment, up to its own position. Padding sees padding, so that every row has a 0.

    Args:
        seeing: [R, q] columns whose queries are computed.
        seen: [R, k] columns that have keys, ``seeing`` among them.
        window: number of positions that sliding-window attention reaches back, including its own; None: all.
        dtype: of the mask, the same as of the embeddings.

    Returns:
        [R, 1, q, k].
    """
    other = seen.segments[:, None, :]
    distance = seeing.positions[:, :, None] - seen.positions[:, None, :]
    visible = ((other == seeing.segments[:, :, None]) | (other == PROMPT)) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def row_mask(llava: Any, columns: Columns, dtype: torch.dtype) -> Tensor:
    """The attention mask of whole rows: their description if the layers read one, else a block mask."""
    if attends_split(llava):
        return describe_rows(columns.segments, columns.positions)
    return block_mask(columns, columns, sliding_window(llava), dtype)


def sliding_window(llava: Any) -> int | None:
    """Number of positions that the model's attention reaches back; None where it reaches to the start."""
    return getattr(llava.config, "sliding_window", None)


@torch.no_grad()
def packing_fault(llava: Any) -> str | None:
    """Why the model cannot compute packed rows, in words; None when it can.

    Rows of three tokens (prompt, answer 1, answer 2) go through the model's layers. If answer 2 changes with answer 1, the
    attention ignores the mask. If answer 2 does not change with the prompt, the attention reads the mask as something else. And
    answer 2 must be about what it is in a row of its own.

    Args:
        llava: a LLaVA model, not wrapped.
    """
    attention = str(getattr(llava.config, "_attn_implementation", ""))
    if "flash" in attention and not attends_split(llava):
        return f"{attention} takes no block mask"
    # Answers of a packed row start at the same position, but their columns make the row longer: a scaling that adapts to the
    # length would turn keys by other angles than in a row of its own.
    scaling = getattr(llava.config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "linear"):
        return f"the rotary scaling {scaling!r} depends on the length of the row"
    embeddings = llava.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    prompt, answer, other, last = torch.randn(4, 1, 1, embeddings.shape[1], generator=generator).to(embeddings)
    columns = Columns(*torch.tensor([[[PROMPT, 1, 2]], [[0, 1, 1]]], device=embeddings.device))
    mask = row_mask(llava, columns, embeddings.dtype)

    def output(*tokens: Tensor, mask: Tensor | None = mask, positions: Tensor = columns.positions) -> Tensor:
        inputs = {"inputs_embeds": torch.cat(tokens, dim=1), "attention_mask": mask}
        return llava.get_model()(**inputs, position_ids=positions, use_cache=False, return_dict=True)[0][:, -1]

    try:
        expected, with_other_answer = output(prompt, answer, last), output(prompt, other, last)
        with_other_prompt = output(other, answer, last)
    except (ValueError, TypeError, RuntimeError, ImportError, UmedError) as error:
        return f"its attention refuses a block mask ({type(error).__name__}: {str(error).splitlines()[0]})"
    if not torch.allclose(expected, with_other_answer, rtol=1e-4, atol=1e-5):
        return "its attention ignores a block mask"
    if torch.allclose(expected, with_other_prompt, rtol=1e-4, atol=1e-5):
        return "its attention reads a block mask as something else"
    plain = output(prompt, last, mask=None, positions=columns.positions[:, :2])
    # Kernels round in different ways, and bf16 has three digits.
    if (expected - plain).float().norm() > 0.1 * plain.float().norm():
        return "its attention computes other outputs for packed rows than for plain ones"
    return None
