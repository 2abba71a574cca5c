"""Where vision relevance is measured while sampling, and that its values are those of a pass of its own."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from support.records import grounded_records

from umed_plugin import patching
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.model.forward import embed_prompts, encode_images
from umed_plugin.patches import attention_mask
from umed_plugin.training import candidate_sampling
from umed_plugin.training.candidate_sampling import Queries
from umed_plugin.training.experience_maker import ExperienceMaker
from umed_plugin.training.value_head import ValueHead

ARGS = SimpleNamespace(
    process_index=0,
    train_batch_size=3,
    gradient_accumulation_steps=1,
    auto_find_batch_size=False,
    deepspeed=None,
    bf16=False,
    fp16=False,
    output_dir="",
)
ONE_RANK = SimpleNamespace(on_any_rank=bool, of_first_rank=float)


@pytest.fixture
def patched():
    patching.apply([attention_mask.PATCH])
    yield
    patching.undo(attention_mask.PATCH)


def maker(loaded, value_head=None, rewards=("vision_relevance",), **flags):
    tokenizer, model = loaded
    flags = UmedFlags(
        umed_stage="rewarding",
        umed_rewards=",".join(rewards),
        umed_num_candidates=2,
        umed_max_new_tokens=8,
        umed_temperature=1.0,
        umed_kl_coef=0.0,
        **flags,
    )
    return ExperienceMaker(model, tokenizer, flags, ARGS, dict.fromkeys(rewards), value_head, None, ONE_RANK)


@pytest.mark.usefixtures("patched")
def test_shares_of_samplings_of_two_and_one_query_equal_those_of_a_pass(loaded, batch, tmp_path, monkeypatch):
    _, model = loaded
    prompts, images = batch
    records = [record for record in json.loads(grounded_records(tmp_path).read_text()) if record["objects"]["bbox"]][:3]
    queries = Queries(prompts, encode_images(model, images), records)
    # Each record's answers name it with other tokens.
    named = {id(record): [index, index + 2] for index, record in enumerate(records)}
    monkeypatch.setattr(
        candidate_sampling,
        "lesion_naming_tokens",
        lambda _tokenizer, _found, repeated: [named[id(r)] for r in repeated],
    )
    made = maker(loaded, umed_sampling_batch_size=2)
    endless = dataclasses.replace(made.sampling.settings, eos_token_id=-1)
    sampling = dataclasses.replace(made.sampling, settings=endless)
    torch.manual_seed(0)
    candidates, shares, of_server = sampling.sample(model, queries)
    assert of_server is None and made.passes.lesions is None
    passes = dataclasses.replace(made.passes, lesions=made.lesions)
    with torch.no_grad():
        whole, _ = passes._attend(model, embed_prompts(model, prompts, queries.features), candidates, records)
    assert shares == pytest.approx(whole, abs=1e-5) and len(shares) == 6
    assert len({round(share, 4) for share in shares}) == 6


@pytest.mark.usefixtures("patched")
def test_a_whole_pass_stays_where_something_else_needs_it(loaded):
    _, model = loaded
    head = ValueHead(model.config.hidden_size)
    assert maker(loaded).sampling.measures_attention
    assert not maker(loaded, rewards=["localization"]).sampling.measures_attention
    assert not maker(loaded, umed_packed=False).sampling.measures_attention
    assert not maker(loaded, umed_updates_per_rollout=2).sampling.measures_attention
    assert not maker(loaded, umed_minibatches_per_rollout=2).sampling.measures_attention
    assert not maker(loaded, value_head=head, umed_algorithm="ppo").sampling.measures_attention
