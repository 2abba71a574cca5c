"""``python -m umed_plugin COMMAND ...`` is ``umed COMMAND ...``."""

import sys

from umed_plugin.cli import main

sys.exit(main())
