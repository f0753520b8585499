"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys

from .failures import INTERRUPTED


def main() -> None:
    """The command ``lockstep``."""
    try:
        from .app import app

        app(prog_name="lockstep")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
