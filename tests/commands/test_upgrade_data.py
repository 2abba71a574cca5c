"""`umed upgrade` notices that annotations or images have changed since its records were built from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.commands.upgrade.run import Upgrade
from umed_plugin.commands.upgrade.settings import RUN_FILE, write_settings
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.errors import UmedError

pytestmark = [pytest.mark.one_stack, pytest.mark.llava]
CHANGED = "annotations or images have changed"


def upgrade_of(checkpoint: Path, folder: Path, redo: bool = False) -> Upgrade:
    data = str(folder / "studies")
    settings = read_settings(None, {"checkpoint": str(checkpoint), "recipe": "demo_studies", "data_root": data})
    return Upgrade(folder / "run", settings, Console(quiet=True), redo)


def changes(checkpoint: Path, folder: Path) -> list[str]:
    """What a later start finds changed in the step that builds the records."""
    upgrade = upgrade_of(checkpoint, folder)
    return upgrade.provenance.differences(upgrade.steps[0], inputs=True)


def correct_a_label(folder: Path) -> None:
    table = folder / "studies" / "annotations.csv"
    text = table.read_text()
    assert "nodule" in text
    table.write_text(text.replace("nodule", "cyst", 1))


@pytest.fixture
def begun(tiny_mistral: Path, tmp_path: Path) -> Path:
    """A folder with studies, and a run that has begun to build their records."""
    make_studies(tmp_path / "studies", train=6, val=2, test=2)
    upgrade = upgrade_of(tiny_mistral, tmp_path)
    upgrade.folder.mkdir()
    write_settings(upgrade.settings, upgrade.folder / RUN_FILE)
    upgrade.provenance.begin(upgrade.steps[0])
    return tmp_path


@pytest.fixture
def built(tiny_mistral: Path, begun: Path) -> Path:
    """The same, and the records are built."""
    upgrade = upgrade_of(tiny_mistral, begun)
    (records,) = upgrade.steps[0].outputs
    records.parent.mkdir()
    records.write_text("[]")
    upgrade.provenance.end(upgrade.steps[0])
    return begun


def test_corrected_labels_are_named_and_redone_on_request(tiny_mistral: Path, built: Path) -> None:
    assert changes(tiny_mistral, built) == []
    correct_a_label(built)
    with pytest.raises(UmedError, match=f"records by recipe demo_studies: data in .*studies, read by .*: {CHANGED}"):
        upgrade_of(tiny_mistral, built).run()
    redone = upgrade_of(tiny_mistral, built, redo=True)
    redone._handle_changes([(redone.steps[0], changes(tiny_mistral, built))])
    assert redone.provenance.read(redone.steps[0]) is None and not redone.plan.records.exists()


def test_another_image_is_noticed(tiny_mistral: Path, built: Path) -> None:
    image = min((built / "studies" / "xray").iterdir())
    os.utime(image, (1, 1))
    assert [line.endswith(CHANGED) for line in changes(tiny_mistral, built)] == [True]


def test_what_cannot_be_compared_is_not_refused(
    tiny_mistral: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another release reads data otherwise, a disk may be gone, and earlier releases wrote no stamp."""
    correct_a_label(built)
    assert len(changes(tiny_mistral, built)) == 1
    with monkeypatch.context() as patched:
        patched.setattr("umed_plugin.commands.upgrade.plan.__version__", "0.0.1")
        assert changes(tiny_mistral, built) == []
    upgrade = upgrade_of(tiny_mistral, built)
    (built / "studies").rename(built / "elsewhere")
    assert upgrade.provenance.differences(upgrade.steps[0], inputs=True) == []
    (built / "studies").mkdir()
    assert changes(tiny_mistral, built) == [], "an empty mount point"
    (built / "studies").rmdir()
    (built / "elsewhere").rename(built / "studies")
    assert len(changes(tiny_mistral, built)) == 1
    made = built / "run" / "made" / "records.json"
    record = json.loads(made.read_text())
    assert record.pop("stamps")
    made.write_text(json.dumps(record))
    assert changes(tiny_mistral, built) == []


def test_labels_may_be_mended_where_a_build_has_failed(tiny_mistral: Path, begun: Path) -> None:
    correct_a_label(begun)
    assert changes(tiny_mistral, begun) == []


def test_a_dry_run_reads_no_data(tiny_mistral: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr("umed_plugin.data.annotations.read_annotations", read)
    assert upgrade_of(tiny_mistral, built).steps[0].line()
