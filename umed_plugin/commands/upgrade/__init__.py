"""``umed upgrade``: from a checkpoint and a recipe to an upgraded checkpoint, its evaluation and a report, in one folder.

Layout of the folder (as of ``umed demo``):

- ``run.yaml``: all settings, read again by each start (`umed_plugin.commands.upgrade.settings`).
- ``made/STEP.json``: what each step was made from, and the hashes of its outputs (`umed_plugin.commands.upgrade.provenance`).
- ``data/records.json``, with rendered images beside it; ``runs/NAME``: the training runs; ``logs/STEP.log``: each step's output.
- ``evaluation/{base,instruction_tuning,rewarding}``, ``summary.json``, ``report.html``.
- ``checkpoint/NAME``: the result, in the layout of the input, with ``umed_manifest.json``.

All steps except summary, manifest and report are commands that you could run by hand. `umed_plugin.commands.upgrade.plan` lists
them, `umed_plugin.commands.upgrade.run` runs them, and `umed_plugin.commands.upgrade.summary` says what they came to.
"""
