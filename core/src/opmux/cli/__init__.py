# SPDX-License-Identifier: Apache-2.0
"""The command line: ``opmux list | explain | doctor | demo``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from opmux.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f'opmux: the command line needs {error.name}: pip install "opmux[cli]"')
    app.cli()
