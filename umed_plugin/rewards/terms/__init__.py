"""The shipped rewards, one file each. The name of the file is the reward's name in ``--umed_rewards``.

To add one, add a file here that registers a function with `umed_plugin.rewards.contract.register_reward` under the file's name,
and a test. The flags, their help and the error messages list the files of this folder.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
