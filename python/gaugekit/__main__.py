"""``python -m gaugekit``: the command line, for where the ``gaugekit`` script is not on PATH."""

import sys

from gaugekit.cli import main

sys.exit(main())
