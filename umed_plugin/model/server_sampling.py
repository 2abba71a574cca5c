"""Sample answers on a rollout server instead of in this process: `umed_plugin.model.sampling` by vLLM.

The prompts are embedded here, by the current projector, and sent as ``prompt_embeds``. So the server needs the language model
alone: no vision tower, no image processor, and nothing that goes stale while the projector learns. It returns the tokens and
their log-probabilities under its own weights and kernels, which differ from this process's by rounding, or by more if they
are not the same weights.

Shapes as in `umed_plugin.model.forward`.
"""

from __future__ import annotations

import base64
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from umed_plugin import files
from umed_plugin.errors import UmedError
from umed_plugin.model.forward import Candidates, PromptBatch
from umed_plugin.model.sampling import SamplingSettings
from umed_plugin.remote.rollout_server import RolloutServer, RolloutServerError


@dataclass(frozen=True)
class ServerAnswers:
    """N sampled answers.

    Attributes:
        candidates: as `umed_plugin.model.sampling.generate` gives them.
        log_probs: [N, T] float32 of the server, at the sampling temperature; 0 at padding.
    """

    candidates: Candidates
    log_probs: Tensor


def sample_on_server(
    server: RolloutServer, model: str, prompts: PromptBatch, settings: SamplingSettings, vocabulary: int
) -> ServerAnswers:
    """Sample K answers to each of Q prompts; the server computes each prompt once.

    Args:
        server: where.
        model: name of the served model, or of an adapter that is loaded there.
        prompts: Q embedded prompts.
        settings: K, temperature and length.
        vocabulary: number of tokens that the model here embeds.

    Raises:
        RolloutServerError: the server is gone, slow, refuses, or returns something else.
    """
    body = {
        "model": model,
        "prompt_embeds": [_encoded(row[mask.bool()]) for row, mask in zip(prompts.embeds, prompts.mask)],
        "n": settings.num_candidates,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        # The server's defaults may come from a generation_config.json: the answers shall come from the whole distribution.
        "top_p": settings.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [settings.eos_token_id],
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    choices = server.complete(body)
    count = len(prompts.mask) * settings.num_candidates
    return _answers(choices, count, settings, vocabulary, prompts.mask.device, server.url)


def vocabulary_of(model: Any) -> int:
    """Number of tokens that a model embeds."""
    return int(model.get_input_embeddings().num_embeddings)


def _encoded(embeds: Tensor) -> str:
    """[L, H] embeddings as vLLM reads them: base64 of ``torch.save``."""
    stream = io.BytesIO()
    torch.save(embeds.detach().cpu().contiguous().clone(), stream)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _answers(
    choices: list[Any], count: int, settings: SamplingSettings, vocabulary: int, device: torch.device, url: str
) -> ServerAnswers:
    """The reply as tensors; its choices come in the order of the prompts, K for each."""
    try:
        ordered = sorted(choices, key=lambda choice: int(choice["index"]))
        tokens = [[int(token) for token in choice["token_ids"]] for choice in ordered]
        log_probs = [[float(value) for value in choice["logprobs"]["token_logprobs"]] for choice in ordered]
    except (KeyError, OverflowError, TypeError, ValueError):
        raise RolloutServerError(
            f"{url}: a completion lacks token_ids or logprobs. Needed: vLLM 0.32 or newer, asked at its own address."
        ) from None
    eos, longest = settings.eos_token_id, settings.max_new_tokens
    faults = [
        row
        for row, (ids, values) in enumerate(zip(tokens, log_probs))
        if not ids
        or len(ids) != len(values)
        or len(ids) > longest
        or not all(0 <= token < vocabulary for token in ids)
        or eos in ids[:-1]
        or (ids[-1] != eos and len(ids) < longest)
    ]
    if len(tokens) != count or faults:
        raise RolloutServerError(
            f"{url}: {len(tokens)} answers of {count} came, {len(faults)} of them not as asked: one log-probability a token, at "
            f"most {longest} tokens from 0 to {vocabulary - 1}, ended by token {eos} or by that length. Does the server hold "
            "another model?"
        )
    width = max(map(len, tokens))
    token_ids = torch.tensor([ids + [eos] * (width - len(ids)) for ids in tokens], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in tokens], device=device)
    values = torch.tensor([row + [0.0] * (width - len(row)) for row in log_probs], device=device)
    return ServerAnswers(Candidates(token_ids, mask), values)


def mean_difference(own: Tensor, sampled: Tensor, mask: Tensor) -> float:
    """Mean distance, in nats, of two [N, T] log-probabilities over the tokens of ``mask``."""
    return (((own.float() - sampled).abs() * mask).sum() / mask.sum().clamp(min=1)).item()


def write_adapter(policy: Any, folder: Path, flag: str = "--umed_rollout_adapters") -> Path:
    """Write the policy's LoRA adapter of the language model as PEFT's two files, in the precision of the weights below it.

    The server would round it to that precision itself. What an adapter changes in the vision tower is in the features already.

    Args:
        policy: a PEFT model with one adapter, its parameters gathered.
        folder: to create, with its parents.
        flag: of the command, that names another place.

    Raises:
        UmedError: the folder cannot be written.
    """
    from peft import get_peft_model_state_dict

    (config,) = policy.peft_config.values()
    dtype = policy.get_base_model().get_input_embeddings().weight.dtype
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in get_peft_model_state_dict(policy).items()
        if ".layers." in name and ".vision_tower." not in name
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "use_rslora": bool(getattr(config, "use_rslora", False)),
        "fan_in_fan_out": bool(config.fan_in_fan_out),
        "bias": "none",
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}),
        "modules_to_save": None,
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        files.write_json(folder / "adapter_config.json", settings)
        # Safetensors lets this user alone read it, and the server may be another's: as the umask says, like the other file.
        (folder / "adapter_model.safetensors").chmod((folder / "adapter_config.json").stat().st_mode & 0o777)
    except (OSError, SafetensorError) as error:
        # Half an adapter is of no use, and on a full disk its room may be enough for the checkpoint that follows.
        shutil.rmtree(folder, ignore_errors=True)
        raise UmedError(
            f"{folder}: the adapter for the rollout server cannot be written ({files.failed_write(error) or error}). Needed: a "
            f"folder with free space that the server can read; {flag} names another."
        ) from error
    return folder
