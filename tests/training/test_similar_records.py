"""``--umed_similar`` in training, evaluation and serve: who is asked with similar cases, and that a run repeats itself."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from PIL import Image
from support.records import grounded_records
from support.tuning import make_dataset, make_tokenizer
from support.umed_runs import train, train_flags, umed_run, weights

from umed_plugin.checkpoints.prompt_templates import TEMPLATES
from umed_plugin.cli import main
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.training.attention_loss_data import LesionDataset
from umed_plugin.training.rewarding_data import QueryDataset
from umed_plugin.training.tuning_data import GroundedDataset

SAID = "Similar studies, nearest first: "


class Tower(torch.nn.Module):
    """Mean colour of each patch row; what LLaVA's tower is to the dataset."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixels):
        return pixels.mean(dim=3).transpose(1, 2) * self.scale + 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def records(tmp_path):
    file = grounded_records(tmp_path / "data")
    made = json.loads(file.read_text())
    made[1] |= {"answer_type": "probe"}
    made += [{**made[2], "id": "of-val", "split": "val", "patient": "v"}]
    file.write_text(json.dumps(made))
    return file


def dataset_of(records, tokenizer, split="train", base=GroundedDataset, tower=None, **flags):
    class WithTower(base):
        def __init__(self, tokens, data_args, training_args, which="train"):
            data_args.umed_tower = tower or Tower()
            super().__init__(tokens, data_args, training_args, which)

    return make_dataset(records, tokenizer, split=split, kind=WithTower, umed_similar=2, **flags)


def questions(dataset):
    return {record["id"]: record["conversations"][0]["value"] for record in dataset.list_data_dict}


@pytest.mark.parametrize("base", [GroundedDataset, LesionDataset, QueryDataset])
def test_records_under_the_stock_template_and_probes_are_asked_without(records, tokenizer, base):
    dataset = dataset_of(records, tokenizer, base=base)
    told = {name: text.startswith(f"<image>\n{SAID}") for name, text in questions(dataset).items()}
    stock = {
        record["id"]: dataset.template_of(index) == TEMPLATES["umed_v1"].stock
        for index, record in enumerate(dataset.list_data_dict)
    }
    assert set(stock.values()) == {True, False}, "both templates are among nine records"
    assert told == {name: not is_stock and name != "record-1" for name, is_stock in stock.items()}
    index = next(i for i in range(len(dataset)) if told[dataset.list_data_dict[i]["id"]])
    ids = dataset.sample(index)["prompt_ids" if base is QueryDataset else "input_ids"]
    text = tokenizer.decode([token for token in ids.tolist() if token >= 0])
    assert "".join(SAID.split()) in "".join(text.split()), "the model reads it"


def test_neighbours_are_of_the_training_split_and_are_found_once(records, tokenizer, capsys):
    first = dataset_of(records, tokenizer, umed_stock_template_share=0)
    told = questions(first)
    assert all(text.startswith(f"<image>\n{SAID}") == (name != "record-1") for name, text in told.items())
    assert "8 of 9 records of the split train begin with similar cases" in capsys.readouterr().out
    held_out = dataset_of(records, tokenizer, "val", umed_stock_template_share=0)
    assert list(questions(held_out)) == ["of-val"] and SAID in questions(held_out)["of-val"]

    class Broken(Tower):
        def forward(self, pixels):
            raise AssertionError("the file of the first start is read again")

    again = dataset_of(records, tokenizer, tower=Broken(), umed_stock_template_share=0)
    assert questions(again) == told
    kept = again.list_data_dict.where(torch.arange(9).numpy() > 6)
    assert [record["conversations"][0]["value"] for record in kept] == list(told.values())[7:]


def test_a_divided_tower_is_refused(records, tokenizer):
    tower = Tower()
    tower.scale.ds_id = 1
    with pytest.raises(UmedError, match="ZeRO-3 divides the vision tower"):
        dataset_of(records, tokenizer, tower=tower)


@pytest.mark.run
def test_both_stages_train_with_them_and_evaluate_asks_with_them(tiny_mistral, tmp_path):
    file = grounded_records(tmp_path / "data")
    made = json.loads(file.read_text())
    made += [{**record, "id": f"t{n}", "split": "test", "patient": f"t{n}"} for n, record in enumerate(made[:2])]
    for n in range(2):  # other pictures than those of the training split
        made[-1 - n]["image"] = f"t{n}.png"
        Image.linear_gradient("L").rotate(90 * n).resize((64, 48)).save(file.parent / f"t{n}.png")
    file.write_text(json.dumps(made))
    steps = ("--max_steps", "2", "--save_strategy", "no", "--umed_similar", "2")
    done = train(tiny_mistral, file, tmp_path / "a-llava-mistral", *steps)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--umed_similar 2: " in done.stdout and "as stock LLaVA asks" in done.stdout
    again = train(tiny_mistral, file, tmp_path / "b-llava-mistral", *steps)
    assert again.returncode == 0
    first, second = weights(tmp_path / "a-llava-mistral"), weights(tmp_path / "b-llava-mistral")
    assert all(torch.equal(first[name], second[name]) for name in first)
    flags = shlex.split(
        "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 4 --umed_rewards localization"
    )
    tuned = tmp_path / "a-llava-mistral"
    command = train_flags(tuned, file, tmp_path / "c-llava-mistral", *flags, *steps, "--max_steps", "1")
    command[command.index("--vision_tower") + 1] = f"{tiny_mistral}/vision_tower"
    rewarded = umed_run(["python", "-m", "llava.train.train_mem", *command])
    assert rewarded.returncode == 0, rewarded.stderr[-2000:]
    words = ["evaluate", str(tuned), "--benchmark", str(file), "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    assert main([*words, "--similar", "2"]) == 0
    for prediction in Evaluation.load(tmp_path / "out").predictions:
        assert prediction.question.startswith(SAID) and prediction.question.split("\n")[0].count(";") == 1
    plain = [*words, "--out", str(tmp_path / "plain"), "--similar", "0"]
    assert main(plain) == 0
    assert not any(SAID in prediction.question for prediction in Evaluation.load(tmp_path / "plain").predictions)
    assert main([*plain, "--similar-from", str(file)]) == 2, "without --similar it has no effect"
    assert main([*words, "--benchmark", "slake", "--data-root", str(tmp_path), "--similar", "1"]) in (1, 2)


@pytest.mark.run
def test_serve_begins_a_conversation_with_them(tiny_mistral, tmp_path):
    from umed_plugin.commands.serve.dialogue import Dialogue

    file = grounded_records(tmp_path / "data")
    dialogue = Dialogue(tiny_mistral, most_tokens=4)
    picture = Image.linear_gradient("L").convert("RGB")

    def prompt_of(**keywords):
        answer = dialogue.answer("key", picture, [], "What is it?", lambda text: None, **keywords)
        return dialogue.tokenizer.decode([token for token in answer.prompt_ids.tolist() if token >= 0])

    without = prompt_of()
    dialogue.look_up(3, str(file))
    said = prompt_of()
    assert "Similar" not in without and "".join(SAID.split()) in "".join(said.split())
    copy = Image.open(file.parent / "0.png").convert("RGB")
    dialogue.answer("copy", copy, [], "What is it?", lambda text: None)
    assert dialogue._said["copy"].count(";") == 2, "the copy itself is left out, others are taken"
    dialogue.forget(lambda key: True)
    assert not dialogue._said
