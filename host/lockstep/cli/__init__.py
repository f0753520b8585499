"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
import warnings

from .failures import INTERRUPTED


def main() -> None:
    """The command ``lockstep``."""
    # Where the RTL refuses a configuration, Amaranth complains about the components that it did not come to.
    warnings.filterwarnings("ignore", message=".*created but never used")
    try:
        from .app import app

        app(prog_name="lockstep")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
