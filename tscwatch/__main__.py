"""Runs the command line as ``python -m tscwatch``."""

import sys

from tscwatch.cli import main

sys.exit(main())
