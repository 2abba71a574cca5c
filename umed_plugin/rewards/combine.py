"""Combine a candidate's rewards into one: ``r = r_llm + r_loc / max r_loc + r_att / max r_att`` (the paper's equation for r).

The maxima run over the K candidates of a query. Departures from the paper:

- A floor under the maximum, so that a best IoU of 0.02 does not count as 1. It is in each term's own scale: 0.1 of an IoU, but
  0.1 times the lesion's share of the patches for vision relevance, whose values are about that share.
- Vision relevance is 0 for an answer that does not name the lesion. If one candidate alone names it, the division gives that one
  up to 1 for the naming, however much it looks at the lesion. A floor of 1 asks for the even share before it gives 1.
- A group in which all rewards are 0 stays 0, also with a floor of 0.
- The maximum is that of the absolute values, so that a user's reward may be negative.
- A single candidate is not normalised; it would always be 1.
- Weights, and z-scores or raw values instead of the maximum, as options. Z-scores of each reward by itself are the first step of
  GDPO (arXiv 2601.05242). Its second, the deviation of the sum over the batch, is ``--umed_advantage_scale batch``.
- Rewards that order the answers oppositely may cancel. The sums then differ by rounding alone, and all candidates get their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from umed_plugin.errors import UmedError
from umed_plugin.flags.names import REWARD_NORMS
from umed_plugin.rewards.values import numbers_of

# Sums that differ by less than this share of what is added up differ by rounding alone.
_ROUNDING = 1e-6


def combine_rewards(
    values: Mapping[str, Sequence[float | None]],
    num_candidates: int,
    *,
    weights: Mapping[str, float],
    norm: str = "max",
    max_normalised: Collection[str] = ("localization", "vision_relevance"),
    floor: float = 0.1,
    least_maxima: Mapping[str, float] | None = None,
    scales: Mapping[str, float | Sequence[float]] | None = None,
) -> Tensor:
    """Sum the rewards of each candidate.

    Args:
        values: reward name -> N = Q*K values, query-major. ``None`` leaves the term out for that candidate: it takes the mean of
            the query's other candidates, which changes no advantage. A query without any value gets 0 from that term, which
            changes no advantage of GRPO; for PPO, see `filled_over_queries`.
        num_candidates: K; N must be a multiple of it.
        weights: reward name -> factor after normalisation.
        norm: ``max`` divides the rewards in ``max_normalised`` by their largest absolute value over the query's candidates, which
            for rewards of 0 and more is the paper's maximum; ``zscore`` standardises every reward over them; ``none`` sums raw
            values.
        max_normalised: names of the rewards that ``max`` applies to.
        floor: lower bound of every maximum, as a multiple of the reward's scale.
        least_maxima: reward name -> a lower bound of its own in the reward's unit, used where it is above that.
        scales: reward name -> how large its values are, in its own unit: one number, or N of them, 0 or more. A query's is the
            largest of its candidates'. A name that is missing has scale 1.

    Returns:
        [Q, K] rewards, float32.

    Raises:
        UmedError: the rewards returned different numbers of values, or a value is not a finite number.

    Example:
        >>> values = {"relevance": [0.5, 1.0], "localization": [0.25, 0.5]}
        >>> combine_rewards(values, 2, weights={"relevance": 1.0, "localization": 1.0})
        tensor([[1., 2.]])
    """
    normalised = normalised_terms(
        values,
        num_candidates,
        norm=norm,
        max_normalised=max_normalised,
        floor=floor,
        least_maxima=least_maxima,
        scales=scales,
    )
    return weighted_sum(normalised, weights)


def normalised_terms(
    values: Mapping[str, Sequence[float | None]],
    num_candidates: int,
    *,
    norm: str = "max",
    max_normalised: Collection[str] = ("localization", "vision_relevance"),
    floor: float = 0.1,
    least_maxima: Mapping[str, float] | None = None,
    scales: Mapping[str, float | Sequence[float]] | None = None,
    missing: float = 0.0,
) -> dict[str, Tensor]:
    """Reward name -> its [Q, K] values as they are weighted and summed, float64; arguments and errors as in `combine_rewards`.

    ``missing`` is what the candidates of a query without any value get.
    """
    _check_lengths(values, num_candidates)
    terms = {}
    for name, column in values.items():
        # In float64: z-scores divide by differences, beside which the rounding of float32 can be large.
        known = [float("nan") if value is None else value for value in numbers_of(name, column)]
        raw = torch.tensor(known, dtype=torch.float64).view(-1, num_candidates)
        least = _least_maxima(raw, floor, (least_maxima or {}).get(name, 0.0), (scales or {}).get(name, 1.0))
        terms[name] = _fill_missing(_normalise(raw, norm, name in max_normalised, least), missing)
    return terms


def filled_over_queries(
    terms: Mapping[str, Tensor], mean_over_ranks: Callable[..., Sequence[float]]
) -> dict[str, Tensor]:
    """The terms of `normalised_terms`, whose ``missing`` was NaN, with the term's mean over all ranks in place of each NaN.

    PPO compares answers to different questions: a 0 would punish an answer whose reward is not known. A term without any value
    is 0 everywhere, which compares nothing.

    Args:
        terms: reward name -> [Q, K]; the same names on all ranks.
        mean_over_ranks: turns numbers of this rank into their means over the ranks. All ranks must call.
    """
    known = {name: term[~term.isnan()] for name, term in terms.items()}
    own = [number for values in known.values() for number in (values.sum().item(), float(len(values)))]
    of_all = mean_over_ranks(*own)
    means = {name: total / max(count, 1e-9) for name, total, count in zip(terms, of_all[::2], of_all[1::2])}
    return {name: term.nan_to_num(means[name]) for name, term in terms.items()}


def scored_answers(values: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> Tensor:
    """bool [N]: whether a reward of a weight above 0 has a value for an answer; all of them, if no weight is above 0."""
    weighing = [column for name, column in values.items() if weights[name]]
    if not weighing:
        return torch.ones(len(next(iter(values.values()))), dtype=torch.bool)
    return torch.tensor([any(value is not None for value in row) for row in zip(*weighing)], dtype=torch.bool)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """[Q, K] float32: the sum over rewards of weight times `normalised_terms`.

    Where the sums of a query differ by rounding alone, each is their mean: the query has no signal. `has_signal` of
    `umed_plugin.training.advantages` cannot tell this from the sums, since what cancelled is no longer in them.
    """
    if not terms:
        raise ValueError("no rewards to combine")
    weighted = torch.stack([weights[name] * term for name, term in terms.items()])
    total, added_up = weighted.sum(dim=0), weighted.abs().sum(dim=0).amax(dim=1, keepdim=True)
    spread = total.amax(dim=1, keepdim=True) - total.amin(dim=1, keepdim=True)
    return torch.where(spread > _ROUNDING * added_up, total, total.mean(dim=1, keepdim=True)).float()


def _least_maxima(raw: Tensor, floor: float, own: float, scale: float | Sequence[float]) -> Tensor:
    """[Q, 1] lower bounds of the queries' maxima of ``raw`` [Q, K], above 0."""
    scales = torch.as_tensor(scale, dtype=raw.dtype).flatten().expand(raw.numel()).view(raw.shape)
    return (floor * scales.amax(dim=1, keepdim=True)).clamp(min=max(own, torch.finfo(raw.dtype).tiny))


def _check_lengths(values: Mapping[str, Sequence[float | None]], num_candidates: int) -> None:
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1 or any(length % num_candidates for length in lengths.values()):
        raise UmedError(
            f"rewards must return one value for each candidate ({num_candidates} per question), but returned {lengths}."
        )


def _fill_missing(term: Tensor, missing: float) -> Tensor:
    """Replace each NaN of [Q, K] by the mean of its query, or by ``missing`` in a query of NaN only."""
    filled = torch.where(term.isnan(), term.nanmean(dim=1, keepdim=True), term)
    return torch.where(filled.isnan(), missing, filled)


def _normalise(raw: Tensor, norm: str, by_maximum: bool, least_maxima: Tensor) -> Tensor:
    """Normalise [Q, K] values over K; NaN is a missing value and stays NaN."""
    if raw.shape[1] == 1 or norm == "none":
        return raw
    if norm == "zscore":
        known = ~raw.isnan()
        count = known.sum(dim=1, keepdim=True).clamp(min=1)
        centred = raw - raw.nansum(dim=1, keepdim=True) / count
        spread = (centred.square().nansum(dim=1, keepdim=True) / count).sqrt()
        # Relative to the values: 1e-6 is rounding for an IoU, and may be all the spread of a term whose values are as small.
        rounding = 1e-6 * raw.nan_to_num(0.0).abs().amax(dim=1, keepdim=True)
        smallest = torch.finfo(raw.dtype).tiny
        return torch.where(
            spread > rounding, centred / spread.clamp(min=smallest), torch.where(known, 0.0, float("nan"))
        )
    if norm != "max":
        raise ValueError(f"unknown reward norm {norm!r}. Allowed: {', '.join(REWARD_NORMS)}.")
    # Of absolute values: a largest one below 0 would turn or blow up the order of a reward that also punishes.
    return raw / raw.nan_to_num(0.0).abs().amax(dim=1, keepdim=True).maximum(least_maxima) if by_maximum else raw
