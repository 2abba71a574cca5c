"""The old name of `umed_plugin.rewards.trl` still works for one release, and says once where its names are now."""

from __future__ import annotations

import subprocess
import sys

import umed_plugin.rewards.trl as home

SCRIPT = """
from umed_plugin.trl_rewards import CombinedReward, LesionAttention
import umed_plugin.trl_rewards
from umed_plugin.trl_rewards import completion_text, trl_dataset
"""


def test_the_alias_has_the_same_public_names():
    import umed_plugin.trl_rewards as alias

    here = {name for name, value in vars(home).items() if getattr(value, "__module__", "") == home.__name__}
    assert set(alias.__all__) == {name for name in here if not name.startswith("_")}
    assert all(getattr(alias, name) is getattr(home, name) for name in alias.__all__)


def test_a_script_that_imports_the_old_name_is_told_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    (warning,) = [line for line in done.stderr.splitlines() if "DeprecationWarning" in line and "umed_plugin" in line]
    assert warning.endswith(
        "script.py:2: DeprecationWarning: umed_plugin.trl_rewards is now umed_plugin.rewards.trl, and the next release removes "
        "the old name. Import from there."
    )
