"""Stage 1's data: supervised token ids exactly, the template share, images that cannot be read, and other faults of data."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from llava import conversation as llava_conversation
from PIL import Image
from support.records import write_records
from support.tuning import make_dataset, make_tokenizer
from transformers import CLIPImageProcessor

from umed_plugin.checkpoints.prompt_templates import TEMPLATES, question_prompt
from umed_plugin.data import record_writer
from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.training.supervision_check import check_supervision
from umed_plugin.training.tuning_data import GroundedDataset, _check_processor, tokenize_record, using_template

ANSWERS = ("There is one abnormal area at [0.10, 0.20, 0.35, 0.40]. It is a nodule.", "At the top left.")


@pytest.mark.parametrize("template", ["umed_v1", "llava_v1", "umed_mistral", "mistral_instruct"])
def test_exactly_the_answers_and_their_ends_are_supervised(records, tokenizer, template):
    dataset = make_dataset(records, tokenizer, template)
    ids, labels = tokenize_record(dataset, 0, template)
    # The Mistral form of LLaVA puts a space before </s>, which is a token of its own.
    space = [tokenizer.convert_tokens_to_ids("▁")] if "mistral" in template else []
    wanted = []
    for answer in ANSWERS:
        wanted += [*tokenizer.encode(answer, add_special_tokens=False), *space, tokenizer.eos_token_id]
    assert labels[labels != -100].tolist() == wanted
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    start = int((labels != -100).nonzero()[0])
    shown = [token for token in ids[:start].tolist() if token != -200]
    prompt = question_prompt("<image>\nIs there anything abnormal?", template).replace("<image>", "")
    assert "".join(tokenizer.decode(shown, skip_special_tokens=True).split()) == "".join(
        prompt.replace("<s>", "").split()
    )


@pytest.mark.parametrize("changed", [{"size": {"shortest_edge": 73}}, {"do_resize": False}])
def test_an_image_processor_that_moves_boxes_is_refused(records, tokenizer, changed, capsys):
    """Of 73 pixels it cuts a border off, and umed's boxes are of the whole image."""

    def made(tokenizer, data_args, training_args, split):
        data_args.image_processor = type(data_args.image_processor)(
            **{**data_args.image_processor.to_dict(), **changed}
        )
        return GroundedDataset(tokenizer, data_args, training_args, split)

    with pytest.raises(
        UmedError, match="all boxes would be off.* (size is 73 x 73, and crop_size 64 x 64|do_resize is false)"
    ):
        make_dataset(records, tokenizer, kind=made)
    records.write_text(records.read_text().replace("at [0.1", "at about [0.1").replace(", 0.20, 0.35, 0.40]", "]"))
    capsys.readouterr()
    make_dataset(records, tokenizer, kind=made)
    assert "umed: warning: --vision_tower: all boxes would be off" in capsys.readouterr().err


def test_an_image_processor_without_a_size_is_refused_where_it_prepares_no_image():
    """transformers 5 keeps null; older ones have a default."""
    processor = CLIPImageProcessor(size=None)
    keeps_null = processor.to_dict()["size"] is None
    expected = pytest.raises(UmedError, match="--vision_tower: .* can prepare no image: size is null. Give size")
    with expected if keeps_null else nullcontext():
        _check_processor(processor, "pad", [], tells=False)


def test_templates_of_llama_with_and_without_legacy(records, tmp_path):
    dataset = make_dataset(records, make_tokenizer(tmp_path, legacy=False))
    report = check_supervision(dataset, dataset.tokenizer, 4)
    assert (report.records, report.templates, report.truncated) == (4, ("umed_v1", "llava_v1"), 0)


def test_a_tokenizer_that_makes_llava_miscount_is_refused(records, tmp_path):
    # Without a piece USER, the second question has another number of tokens after </s> than alone.
    dataset = make_dataset(records, make_tokenizer(tmp_path, legacy=False, symbols=()))
    with pytest.raises(UmedError) as caught:
        check_supervision(dataset, dataset.tokenizer, 8)
    for part in ("16 of 16", "record record-0", "template umed_v1", "At the top left.", "remedy"):
        assert part in str(caught.value)


def test_wrong_labels_are_refused(records, tokenizer, monkeypatch):
    from llava.train import train as llava_train

    stock = llava_train.preprocess

    def one_token_early(*args, **keywords):
        item = stock(*args, **keywords)
        item["labels"] = [torch.roll(labels, -1) for labels in item["labels"]]
        return item

    monkeypatch.setattr(llava_train, "preprocess", one_token_early)
    dataset = make_dataset(records, tokenizer)
    with pytest.raises(UmedError, match="supervised"):
        check_supervision(dataset, tokenizer, 2)


def test_truncated_answers_are_reported_and_lost_ones_refused(records, tokenizer, capsys):
    dataset = make_dataset(records, tokenizer)
    length = len(tokenize_record(dataset, 0, "umed_v1")[0]) + 63
    tokenizer.model_max_length = length - 1
    try:
        assert check_supervision(dataset, tokenizer, 1).truncated >= 1
        assert "--model_max_length" in capsys.readouterr().err
        tokenizer.model_max_length = 70
        with pytest.raises(UmedError, match="whole answer lies beyond --model_max_length 70"):
            check_supervision(dataset, tokenizer, 1)
    finally:
        tokenizer.model_max_length = 512


def test_a_long_record_that_no_sample_meets_is_found(records, tokenizer, capsys):
    """64 samples among 200,000 records meet none of the few whose answer LLaVA would cut."""
    items = json.loads(records.read_text())
    for item in items:
        item["conversations"] = item["conversations"][:2]
    items[5]["conversations"][1]["value"] = "It is a nodule. " * 200
    records.write_text(json.dumps(items))
    assert check_supervision(make_dataset(records, tokenizer), tokenizer, 1).truncated == 0
    assert "1 of 8 records lose the end of their answer at --model_max_length 512, the first: record record-5" in (
        capsys.readouterr().err
    )
    items[5]["conversations"][0]["value"] = "<image>\n" + "Is there a nodule? " * 200
    records.write_text(json.dumps(items))
    with pytest.raises(UmedError, match="1 of 8 records would teach nothing, the first: record record-5"):
        check_supervision(make_dataset(records, tokenizer), tokenizer, 1)


def test_a_long_text_without_an_image_is_cut_and_said(records, tokenizer, capsys):
    items = json.loads(records.read_text())
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is a nodule. " * 200}]
    records.write_text(json.dumps([*items, {"id": "text", "conversations": turns}]))
    check_supervision(make_dataset(records, tokenizer), tokenizer, 1)
    assert "the first: record text" in capsys.readouterr().err


def test_a_share_of_the_records_keeps_the_stock_template(tmp_path, tokenizer):
    records = write_records(tmp_path / "data", count=400)
    dataset = make_dataset(records, tokenizer, umed_stock_template_share=0.3)
    templates = [dataset.template_of(i) for i in range(len(dataset))]
    assert 0.2 < templates.count("llava_v1") / len(templates) < 0.4
    assert templates == [
        make_dataset(records, tokenizer, umed_stock_template_share=0.3).template_of(i) for i in range(400)
    ]
    for share, name in ((0.0, "umed_v1"), (1.0, "llava_v1")):
        other = make_dataset(records, tokenizer, umed_stock_template_share=share)
        assert {other.template_of(i) for i in range(50)} == {name}
    assert make_dataset(records, tokenizer, "v1").template_of(0) == "v1"


def test_an_item_is_llavas_item_under_its_template(records, tokenizer):
    dataset = make_dataset(records, tokenizer)
    before = llava_conversation.default_conversation
    item = dataset[3]
    assert llava_conversation.default_conversation is before
    ids, labels = tokenize_record(dataset, 3, dataset.template_of(3))
    assert torch.equal(item["input_ids"], ids)
    assert torch.equal(item["labels"], labels)
    assert item["image"].shape == (3, 64, 64)
    for mode in ("pad", "square"):
        dataset.data_args.image_aspect_ratio = mode
        assert torch.equal(dataset[3]["image"], dataset.load_image(3))


def test_using_a_template_is_undone_after_an_error():
    before = llava_conversation.default_conversation
    with pytest.raises(ZeroDivisionError), using_template("umed_mistral") as template:
        assert llava_conversation.default_conversation is template
        assert template.system == TEMPLATES["umed_mistral"].system
        raise ZeroDivisionError
    assert llava_conversation.default_conversation is before


@pytest.mark.parametrize("damage", ["cut", "missing", "text"])
def test_a_bad_image_stops_or_is_skipped_with_a_report(records, tokenizer, capsys, damage):
    file = records.parent / "2.png"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:900] if damage == "cut" else b"no image")
    with pytest.raises(UmedError) as caught:
        make_dataset(records, tokenizer)[2]
    for part in ("record-2", str(file), "--umed_on_bad_image skip"):
        assert part in str(caught.value)
    dataset = make_dataset(records, tokenizer, umed_on_bad_image="skip")
    assert torch.equal(dataset[2]["image"], dataset[3]["image"])
    dataset[2]
    assert capsys.readouterr().err.count("record-2") == 1


@pytest.mark.parametrize(("mode", "size"), [("pad", (1, 1)), ("square", (3000, 1)), ("square", (50, 3))])
def test_a_degenerate_image_is_named_with_its_record(records, tokenizer, mode, size):
    records.write_text(records.read_text().replace('"pad"', f'"{mode}"'))
    Image.new("RGB", size).save(records.parent / "2.png")
    with pytest.raises(UmedError, match=rf"record-2: cannot read the image .*has {size[0]} x {size[1]} pixels"):
        make_dataset(records, tokenizer, image_aspect_ratio=mode)[2]
    dataset = make_dataset(records, tokenizer, image_aspect_ratio=mode, umed_on_bad_image="skip")
    assert torch.equal(dataset[2]["image"], dataset[3]["image"])


def test_when_no_image_can_be_read_there_is_an_end(records, tokenizer):
    for image in records.parent.glob("*.png"):
        image.unlink()
    with pytest.raises(UmedError, match="none of the 8 images"):
        make_dataset(records, tokenizer, umed_on_bad_image="skip")[0]


def test_a_fault_that_is_not_the_images_is_not_swallowed(records, tokenizer, monkeypatch):
    def broken(self, index, epoch):
        raise ValueError("not the image")

    monkeypatch.setattr(GroundedDataset, "sample", broken)
    with pytest.raises(UmedError, match=r"record record-0: .*ValueError: not the image"):
        make_dataset(records, tokenizer, umed_on_bad_image="skip")[0]


def test_records_of_another_aspect_ratio_are_refused(records, tokenizer):
    with pytest.raises(UmedError) as caught:
        make_dataset(records, tokenizer, image_aspect_ratio="square")
    for part in ("8 of 8", "record-0", "--image_aspect_ratio pad", "umed recipe build"):
        assert part in str(caught.value)


def test_other_splits_are_left_out(records, tokenizer, capsys):
    content = json.loads(records.read_text())
    content[0]["split"], content[1]["split"] = "test", "val"
    records.write_text(json.dumps(content))
    assert len(make_dataset(records, tokenizer)) == 6
    assert "2 records of other splits" in capsys.readouterr().out
    assert len(make_dataset(records, tokenizer, rank=1)) == 6
    assert "other splits" not in capsys.readouterr().out, "the first rank has said so"
    records.write_text(json.dumps(content[:2]))
    with pytest.raises(UmedError, match="no record of the split 'train'"):
        make_dataset(records, tokenizer)


def test_splits_that_nothing_reads_are_named_and_null_is_train(records, tokenizer, capsys):
    items = json.loads(records.read_text())
    items[0]["split"], items[1]["split"], items[2]["split"] = None, "Train", "training"
    records.write_text(json.dumps(items))
    assert len(make_dataset(records, tokenizer)) == 6
    said = capsys.readouterr()
    assert "records with the split 'Train' (1), 'training' (1) are used by nothing" in said.err
    assert "2 records of other splits (Train, training)" in said.out
    records.write_text(json.dumps(items[1:3]))
    with pytest.raises(UmedError, match="'split' is 'Train', 'training'"):
        make_dataset(records, tokenizer)


def test_json_lines_and_a_key_twice_are_named(records, tokenizer):
    items = json.loads(records.read_text())
    records.write_text("\n".join(map(json.dumps, items)))
    with pytest.raises(UmedError, match="It seems to be JSON lines"):
        make_dataset(records, tokenizer)
    records.write_text('\ufeff[{"id": 1, "image": "0.png", "image": "1.png"}]', encoding="utf-8")
    with pytest.raises(UmedError, match="the key 'image' appears twice"):
        make_dataset(records, tokenizer)


def test_a_record_of_another_reader_needs_that_reader(records, tokenizer, tmp_path):
    """Pixels of a slice or a window: LLaVA's own reader would show page 0, clipped."""
    items = json.loads(records.read_text())
    items[3]["reading"] = {"slice": 3, "window": "full"}
    records.write_text(json.dumps(items))
    with pytest.raises(UmedError, match=r"1 of 8 records \(the first: record-3\).*Give --umed_image_cache"):
        make_dataset(records, tokenizer)
    assert len(make_dataset(records, tokenizer, umed_image_cache=str(tmp_path / "cache"))) == 8


def test_more_than_8_bits_are_not_clipped_in_silence(records, tokenizer):
    Image.fromarray(torch.full((48, 64), 900).numpy().astype("uint16")).save(records.parent / "2.png")
    with pytest.raises(UmedError, match=r"record-2: cannot read the image .*more than 8 bits"):
        make_dataset(records, tokenizer)
    dataset = make_dataset(records, tokenizer, umed_on_bad_image="skip")
    assert torch.equal(dataset[2]["image"], dataset[3]["image"])


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[" * 100_000])
def test_a_data_file_that_is_none_is_named(records, tokenizer, content):
    records.write_text(content)
    with pytest.raises(UmedError, match=r"records\.json: is not"):
        make_dataset(records, tokenizer)


@pytest.mark.parametrize(
    ("template", "text"),
    [("umed_v1", "A mass.</s>"), ("umed_v1", "x ASSISTANT: y"), ("umed_mistral", "[/INST] y"), ("v1", "A mass.</s>")],
)
def test_an_item_that_llava_would_mask_wrongly_is_named_though_no_sample_is_checked(records, tokenizer, template, text):
    items = json.loads(records.read_text())
    items[2]["conversations"][1]["value"] = text
    records.write_text(json.dumps(items))
    with pytest.raises(UmedError, match=r"records\.json: 1 of \d+ items(.|\n)*\[2\]") as caught:
        make_dataset(records, tokenizer, template)
    assert "where the template ends a turn" in str(caught.value)


def write_coco_recipe(folder):
    """Two images with a box each in COCO form, and a recipe that reads them."""
    data = folder / "coco"
    data.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(data / name)
    content = {
        "images": [{"id": i, "file_name": f"{n}.png", "width": 60, "height": 40} for i, n in enumerate("ab")],
        "annotations": [{"id": i, "image_id": i, "category_id": 0, "bbox": [5, 6, 20, 12]} for i in range(2)],
        "categories": [{"id": 0, "name": "nod"}],
    }
    (data / "train.json").write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text(
        f"{{name: x, description: x, terms: {{licence: CC0, url: x}}, data_root: {data}, split: {{by: file}},\n"
        "annotations: {reader: coco, files: {train: train.json}}, classes: {nod: {name: nodule}}}\n"
    )
    return folder / "recipe.yaml", data


def test_a_recipe_is_built_once_and_again_when_anything_it_is_made_from_changes(
    records, tokenizer, monkeypatch, capsys
):

    recipe, data = write_coco_recipe(records.parent)

    def built(**flags):
        """Whether making the dataset builds the records."""
        dataset = make_dataset(records, tokenizer, umed_recipe=str(recipe), **flags)
        assert len(dataset) == 10, "the recipe's records and those of --data_path"
        assert dataset.list_data_dict[0]["image"] == str(data / "a.png")
        shown = capsys.readouterr().out
        assert ("umed: built 2 records" in shown) != ("are used again" in shown)
        return "umed: built" in shown

    assert built() and not built()
    assert built(umed_box_decimals=3) and not built(umed_box_decimals=3)
    assert built(umed_box_decimals=3, umed_on_bad_image="skip")
    assert built() and not built()
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["bbox"][2] = 21
    (data / "train.json").write_text(json.dumps(content))
    assert built() and not built()
    Image.new("RGB", (60, 40), (9, 9, 9)).save(data / "b.png")
    assert built() and not built()
    recipe.write_text(recipe.read_text().replace("nodule", "node"))
    assert built() and not built()
    monkeypatch.setitem(record_writer.WRITERS, "grounded", "another")
    assert built() and not built()


def test_held_out_records_lie_beside_those_for_training_and_plain_items_are_not_scored(records, tokenizer, capsys):
    recipe, data = write_coco_recipe(records.parent)
    held_out = json.loads((data / "train.json").read_text())
    Image.new("RGB", (60, 40)).save(data / "c.png")
    held_out["images"] = [{"id": 0, "file_name": "c.png", "width": 60, "height": 40}]
    held_out["annotations"] = held_out["annotations"][:1]
    (data / "held_out.json").write_text(json.dumps(held_out))
    recipe.write_text(recipe.read_text().replace("train: train.json", "train: train.json, val: held_out.json"))
    content = json.loads(records.read_text())
    content[3]["split"] = "val"
    records.write_text(json.dumps(content))

    for _ in range(2):  # built, and used again
        trained = make_dataset(records, tokenizer, umed_recipe=str(recipe)).list_data_dict
        assert [record["split"] for record in trained] == ["train"] * 9
        held_out = make_dataset(records, tokenizer, umed_recipe=str(recipe), split="val").list_data_dict
        assert [record["id"] for record in held_out] == ["x/c.png"]  # record-3 of the file is a plain item
        assert "1 of 2 held-out records have no true boxes, or are probes: they are not scored." in "".join(
            capsys.readouterr()
        )
        assert held_out[0]["image"] == str(data / "c.png")
    make_dataset(records, tokenizer, umed_recipe=str(recipe), split="val", rank=1)
    assert "not scored" not in "".join(capsys.readouterr()), "the first rank has said so"
    with pytest.raises(UmedError, match="no images in split 'test'"):
        make_dataset(records, tokenizer, umed_recipe=str(recipe), split="test")


def test_an_interrupted_build_leaves_no_stamp(records, tokenizer, monkeypatch):
    from umed_plugin.training import training_records

    recipe, _ = write_coco_recipe(records.parent)
    make_dataset(records, tokenizer, umed_recipe=str(recipe))
    stamp = records.parent / "out" / "umed_data" / "build.json"
    assert stamp.is_file()

    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_records, "build_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(records, tokenizer, umed_recipe=str(recipe), umed_box_decimals=3)
    assert not stamp.exists()


def test_rewards_need_true_boxes(records, tokenizer):
    from umed_plugin.training.training_records import training_records

    dataset = make_dataset(records, tokenizer)
    args = SimpleNamespace(umed=UmedFlags(umed_stage="rewarding"))
    with pytest.raises(UmedError, match="objects"):
        training_records(dataset.data_args, args)
