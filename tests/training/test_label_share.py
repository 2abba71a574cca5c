"""``--umed_label_share``: the stages divide the labelled studies by patient, and stage 1 has nothing about those of stage 2."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.records import records_of_four_patients, write_records
from support.tuning import make_dataset, make_tokenizer
from support.umed_runs import train_flags, umed_run

from umed_plugin import merge
from umed_plugin.checkpoints.exporting import export
from umed_plugin.checkpoints.label_share import share_of
from umed_plugin.data.record_file import _patient_hash
from umed_plugin.errors import UmedError
from umed_plugin.flags.checkpoint_settings import find_other_share
from umed_plugin.training.label_share import name_share, own_share


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return records_of_four_patients(tmp_path / "data")


def test_the_stages_divide_the_labelled_studies_by_patient(records: Path, tokenizer: Any, capsys: Any) -> None:
    items = json.loads(records.read_text())
    plain = json.loads(write_records(records.parent / "more", count=3).read_text())
    for n in range(10):
        for item in items:
            shutil.copy(records.parent / item["image"], records.parent / f"{n}-{item['image']}")
    items = [
        {**item, **{name: f"{n}-{item[name]}" for name in ("id", "patient", "image")}}
        for n in range(10)
        for item in items
    ]
    items += [{**item, "id": f"plain-{item['id']}", "image": f"more/{item['image']}"} for item in plain]
    records.write_text(json.dumps(items))
    first = make_dataset(records, tokenizer, umed_label_share=0.3)
    names = {record["id"] for record in first.list_data_dict}
    records.write_text(json.dumps(items[::-1]))
    again = make_dataset(records, tokenizer, umed_label_share=0.3)
    assert names == {record["id"] for record in again.list_data_dict}, "the order of the file does not count"
    assert sum(name.startswith("plain-") for name in names) == 3, "what has no boxes is stage 1's"
    patients = {item["patient"] for item in items[:80] if item["id"] in names}
    assert names - {f"plain-{item['id']}" for item in plain} == {
        item["id"] for item in items[:80] if item["patient"] in patients
    }
    assert 5 <= len(patients) <= 20
    told = capsys.readouterr().out
    studies = 2 * len(patients)
    assert (
        f"divides 80 labelled studies of 40 patients by patient: stage 1 {studies} labelled studies of {len(patients)} "
        in told
    )
    assert f"stage 2 {80 - studies} labelled studies of {40 - len(patients)} patients. This is stage 1." in told

    whole = make_dataset(records, tokenizer).list_data_dict
    others, told = own_share(whole, 0.3, "rewarding")
    rest = {record["id"] for record in others}
    assert not rest & names and rest | names == {item["id"] for item in items} and told.endswith("This is stage 2.")


def test_the_records_of_an_image_without_a_patient_are_of_one_stage(records: Path, tokenizer: Any) -> None:
    """As an evaluation counts them. A record without patient and image is one by itself."""
    studies = [{**item, "patient": ""} for item in json.loads(records.read_text())]
    again = [
        {**item, "id": f"again-{item['id']}", "source": "other", "image": f"./{item['image']}"} for item in studies
    ]
    records.write_text(json.dumps(studies + again))
    whole = make_dataset(records, tokenizer, umed_label_share=0.5).list_data_dict
    names = {record["id"] for record in whole}
    assert names and names == {name[6:] if name.startswith("again-") else f"again-{name}" for name in names}
    texts = [_patient_hash({"id": name, "source": "s"}) for name in ("a", "b")]
    assert len({*texts, _patient_hash({"id": "a", "source": "s", "patient": "p"})}) == 3


def test_probes_and_reports_are_no_labelled_studies(records: Path, tokenizer: Any, capsys: Any) -> None:
    """Both stages say the same counts, and no study of stage 2 is asked about in stage 1."""
    studies = json.loads(records.read_text())
    probes = [{**item, "id": f"probe-{item['id']}", "answer_type": "probe"} for item in studies]
    objects = {"ref": ["nodule"], "bbox": []}
    reports = [{**item, "id": f"report-{item['id']}", "answer_type": "report", "objects": objects} for item in studies]
    records.write_text(json.dumps(studies + probes + reports))
    shares = {}
    for stage in ("instruction_tuning", "rewarding"):
        dataset = make_dataset(records, tokenizer, umed_label_share=0.5, umed_stage=stage)
        shares[stage] = [str(record["id"]) for record in dataset.list_data_dict]
    told = [line for line in capsys.readouterr().out.splitlines() if "--umed_label_share" in line]
    assert len(told) == 2 and all("divides 8 labelled studies of 4 patients" in line for line in told)
    names = {record["id"] for record in studies}
    own = set(shares["rewarding"])
    assert own < names and own
    expected = {f"{kind}{name}" for name in names - own for kind in ("", "probe-", "report-")}
    assert set(shares["instruction_tuning"]) == expected
    left = f"{len(own)} probes, {len(own)} reports"
    assert told[0].endswith(f"stage 1. Left out, since they are about patients or images of stage 2: {left}.")
    assert told[1].endswith("This is stage 2.")


def test_stage_1_has_nothing_about_patients_or_images_of_stage_2(records: Path, tokenizer: Any, capsys: Any) -> None:
    """A plain item may say what its image shows. Its path may be absolute where a record's is relative, and the reverse."""
    studies = json.loads(records.read_text())
    folder = records.parent

    def plain(name: str, **more: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cyst in the upper left."}]
        return {"id": name, **more, "conversations": turns}

    for number, study in enumerate(studies):
        study["image"] = str(folder / study["image"]) if number % 4 < 2 else study["image"]
    names = {Path(study["image"]).name: study["id"] for study in studies}
    for name in ("unseen.png", "later.png"):
        shutil.copy(folder / next(iter(names)), folder / name)
    items = [
        plain(f"{form}{owner}", image=path)
        for name, owner in names.items()
        for form, path in (("relative-", f"./{name}"), ("absolute-", str(folder / name)))
    ]
    # A patient's other image, and the same image in an item that does not name the patient.
    of_patient = {study["id"]: {"patient": study["patient"], "source": study["source"]} for study in studies[::2]}
    reports = [plain(f"text-{name}", **whose) for name, whose in of_patient.items()]
    nameless = [plain("by-nobody"), plain("of-nobody", image="unseen.png")]
    records.write_text(json.dumps([*studies, *items, *reports, *nameless]))
    kept = {record["id"] for record in make_dataset(records, tokenizer, umed_label_share=0.5).list_data_dict}
    told = next(line for line in capsys.readouterr().out.splitlines() if "--umed_label_share" in line)
    own = {study["id"] for study in studies} & kept
    assert own and len(own) < len(studies)
    pairs = {f"{form}{name}" for form in ("relative-", "absolute-") for name in own}
    texts = {f"text-{name}" for name in of_patient if name in own}
    assert kept == own | pairs | texts | {"by-nobody", "of-nobody"}
    gone = 2 * (len(studies) - len(own)) + len(reports) - len(texts)
    assert f"patients or images of stage 2: {gone} items without true boxes. " in told
    assert f"Kept, since the image is not stage 2's: {len(pairs) + 1} items that name no patient. " in told
    assert told.endswith("Kept: 1 item that names neither patient nor image.")

    theirs = next(study for study in studies if study["id"] not in own)
    whose = {"patient": theirs["patient"], "source": theirs["source"]}
    chain = [plain("later", image="later.png", **whose), plain("again", image="later.png")]
    other = {**next(study for study in studies if study["id"] in own), "id": "same picture", "image": theirs["image"]}
    records.write_text(json.dumps([*studies, *chain, other]))
    again = {record["id"] for record in make_dataset(records, tokenizer, umed_label_share=0.5).list_data_dict}
    assert again == own
    told = next(line for line in capsys.readouterr().out.splitlines() if "--umed_label_share" in line)
    assert f"stage 1 {len(own)} labelled studies of" in told
    assert "In neither stage, since they share an image with one of stage 2: 1 labelled study. " in told
    assert told.endswith("images of stage 2: 2 items without true boxes.")


def test_a_share_that_leaves_a_stage_without_studies_is_refused(records: Path, tokenizer: Any) -> None:
    with pytest.raises(
        UmedError, match=r"0.001 divides 8 labelled studies of 4 patients .* stage 1 0 labelled studies of 0"
    ):
        make_dataset(records, tokenizer, umed_label_share=0.001)
    plain = write_records(records.parent / "plain")
    with pytest.raises(UmedError, match="divides 0 labelled studies of 0 patients"):
        make_dataset(plain, tokenizer, umed_label_share=0.5)


def test_studies_that_name_no_patient_are_counted(records: Path, tokenizer: Any, capsys: Any) -> None:
    """A patient who is called as the file is, is not known. Two images of a person may then be in both stages."""
    studies = json.loads(records.read_text())
    make_dataset(records, tokenizer, umed_label_share=0.5)
    assert "name no patient" not in capsys.readouterr().out
    studies[0]["patient"] = ""
    studies[1]["provenance"]["patient"] = "file name"
    records.write_text(json.dumps(studies))
    for stage in ("instruction_tuning", "rewarding"):
        make_dataset(records, tokenizer, umed_label_share=0.5, umed_stage=stage)
        assert "2 of 8 labelled studies name no patient. Each of their images counts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "share", "named"),
    [
        (None, None, 1.0),
        (None, 0.5, 0.5),
        (0.5, 0.3, 0.5),
        (0.3, 0.5, 0.5),
        (0.5, None, 1.0),
        (1.0, 0.5, 1.0),
        ("half", 0.5, 0.5),
    ],
)
@pytest.mark.parametrize("where", ["checkpoint", "projector", "resumed"])
def test_a_checkpoint_names_the_largest_share_that_its_stage_1_has_had(
    where: str, before: Any, share: Any, named: float, records: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Of the checkpoint, of the projector that it takes, and of the run that it goes on from."""
    trained_on = make_dataset(records, tokenizer).list_data_dict
    known = {} if before is None else {"umed_label_share": before}
    config = SimpleNamespace(**(known if where == "checkpoint" else {}))
    for name, folder in (("projector", "projector"), ("resumed", "out/checkpoint-5")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(known if where == name else {}))
    assert share_named(config, tmp_path, trained_on, share) == named


def share_named(config: Any, folder: Path, records: Any, share: Any, stage: str = "instruction_tuning") -> Any:
    """What a stage writes that starts from ``config`` and a projector, and goes on from the checkpoints in ``out``."""
    args = SimpleNamespace(
        umed=SimpleNamespace(umed_label_share=share), umed_stage=stage, output_dir=str(folder / "out")
    )
    projector = str(folder / "projector" / "mm_projector.bin")
    name_share(config, args, SimpleNamespace(pretrain_mm_mlp_adapter=projector), records)
    return getattr(config, "umed_label_share", None)


def test_of_several_shares_the_largest_is_named_and_damaged_files_are_told(
    records: Path, tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    labelled = make_dataset(records, tokenizer).list_data_dict
    plain = make_dataset(write_records(tmp_path / "plain"), tokenizer).list_data_dict
    for folder, share in (("projector", 0.5), ("out/checkpoint-5", 0.7), ("out/checkpoint-10", 0.4)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"umed_label_share": share}))
    assert share_named(SimpleNamespace(umed_label_share=0.3), tmp_path, labelled, 0.2) == 0.7
    (tmp_path / "out/checkpoint-5/config.json").write_text("")  # as a power cut leaves it
    assert share_named(SimpleNamespace(umed_label_share=0.3), tmp_path, labelled, 0.2) == 0.5
    assert "checkpoint-5/config.json" in capsys.readouterr().err
    # What trains on no labels passes on what is known, and claims nothing.
    assert share_named(SimpleNamespace(), tmp_path, labelled, 0.2, "rewarding") == 0.5
    assert share_named(SimpleNamespace(), tmp_path, plain, None) == 0.5
    assert share_named(SimpleNamespace(), tmp_path / "elsewhere", plain, None) is None
    assert share_named(SimpleNamespace(), tmp_path / "elsewhere", labelled, None, "rewarding") is None


THIRD = 1 / 3


@pytest.mark.parametrize(
    ("had", "share", "words"),
    [
        (None, None, None),
        (0.5, 0.5, None),
        (1.0, None, None),
        (0.5, 0.3, "stage 2 trains on studies that stage 1 knows: then give stage 2 --umed_label_share 0.5."),
        (
            0.5,
            None,
            "no --umed_label_share is given, but a stage 1 behind the checkpoint has trained on a share of 0.5. If the",
        ),
        (THIRD, None, f"then give stage 2 --umed_label_share {THIRD!r}."),
        (0.5, 0.7, "those between the two shares are in neither stage: then give stage 2 --umed_label_share 0.5."),
        (
            1.0,
            0.5,
            "has trained on all labelled studies. If they are the same, it knows those of stage 2: then give stage 1",
        ),
        (None, 0.5, "the checkpoint does not say on which share stage 1 has trained"),
    ],
)
def test_stage_2_says_where_its_share_is_not_what_stage_1_left(had: Any, share: Any, words: Any) -> None:
    remarks = find_other_share(had, share)
    assert len(remarks) == (words is not None) and all(words in remark for remark in remarks)


@pytest.mark.run
@pytest.mark.parametrize("kind", ["lora", "full", "projector"])
def test_the_share_goes_from_stage_1_to_stage_2(kind: str, records: Path, tiny_mistral: Path, tmp_path: Path) -> None:
    def run(checkpoint: Path, output: Path, flags: str) -> Any:
        command = train_flags(checkpoint, records, output, "--max_steps", "1", *shlex.split(flags))
        done = umed_run(["python", "-m", "llava.train.train_mem", *command])
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    trained, next_start = tmp_path / "llava-mistral-lora", tmp_path / "llava-mistral-stage1"
    of_kind = {"lora": "--lora_enable True --save_steps 1", "full": "", "projector": "--tune_mm_mlp_adapter True"}[kind]
    first = run(tiny_mistral, trained, f"--umed_stage instruction_tuning --umed_label_share 0.5 {of_kind}")
    assert "--umed_label_share is" not in first.stdout + first.stderr
    with_projector = ""
    if kind == "full":
        export(trained, next_start, like=tiny_mistral)
    elif kind == "lora":
        merge(trained, tiny_mistral, next_start)
        assert share_of(json.loads((trained / "checkpoint-1" / "config.json").read_text())) == 0.5
    else:
        next_start, with_projector = tiny_mistral, f"--pretrain_mm_mlp_adapter {trained / 'mm_projector.bin'}"
    rewarding = (
        f"--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 8 --umed_rewards relevance --lora_enable True "
        f"{with_projector}"
    )
    second = run(next_start, tmp_path / "second-lora", rewarding)
    told = "no --umed_label_share is given, but a stage 1 behind the checkpoint has trained on a share of 0.5."
    assert f"warning: {told}" in second.stderr
    again = run(next_start, tmp_path / "third-lora", f"{rewarding} --umed_label_share 0.5")
    assert "--umed_label_share is" not in again.stdout + again.stderr
    assert share_of(json.loads((tmp_path / "third-lora" / "config.json").read_text())) == 0.5
