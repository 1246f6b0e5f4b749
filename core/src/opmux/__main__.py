# SPDX-License-Identifier: Apache-2.0
"""``python -m opmux``: the command line."""

from opmux.cli import main

main()
