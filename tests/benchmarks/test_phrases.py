"""The benchmark of phrases: the whole way on a few pictures."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import phrases
import pytest
from support import forked

from umed_plugin.commands import processes
from umed_plugin.data.records import record_faults

pytestmark = pytest.mark.one_stack


@pytest.mark.run
def test_boxes_are_compared_with_those_to_the_other_phrase(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=forked.popen, STDOUT=subprocess.STDOUT))
    phrases.main([str(tmp_path), *["--pictures", "8", "--test", "4", "--epochs", "1", "--processes", "1"]])
    found = json.loads((tmp_path / "results.json").read_text())["0"]
    assert found["as_written"]["mean_iou"]["n"] == found["swapped"]["mean_iou"]["n"] == 8
    assert "| 0 | integer_iou |" in capsys.readouterr().out
    records = json.loads((tmp_path / "seed0/data/test.json").read_text())
    assert not any(record_faults(record) for record in records)
    first, second = records[:2]
    assert first["image"] == second["image"] and first["phrase"] == second["other_phrase"]
    other = phrases.swapped(records)[0]
    assert other["objects"] == first["objects"] and second["phrase"] in other["conversations"][0]["value"]
