# SPDX-License-Identifier: Apache-2.0
"""``opmux check-abi``: which torch, which Python and which Linux a wheel's libraries load in.

Nothing is loaded or imported: the answer follows from the ELF symbols and the wheel's metadata.
"""

from __future__ import annotations

from opmux.abi.check import Report, check
from opmux.abi.rules import Finding

__all__ = ["Finding", "Report", "check"]
