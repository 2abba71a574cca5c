"""``umed upgrade``: a checkpoint and a recipe become an upgraded checkpoint, its evaluation and a report, in one folder.

What lies in the folder (the same layout as that of ``umed demo``):

- ``run.yaml``: all settings; read again by each start (`umed_plugin.commands.upgrade.settings`).
- ``made/STEP.json``: what each finished step was made from, and the hashes of what it made (`umed_plugin.commands.upgrade.made`).
- ``data/records.json``, with rendered images beside it; ``runs/NAME``: the training runs; ``logs/STEP.log``: what steps printed.
- ``evaluation/{base,instruction_tuning,rewarding}``, ``summary.json``, ``report.html``.
- ``checkpoint/NAME``: the result, in the layout of the input, with ``umed_manifest.json``.

Every step but the last small ones is a command that a person could run by hand; `umed_plugin.commands.upgrade.plan` lists them,
`umed_plugin.commands.upgrade.run` runs them.
"""
