# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several files share."""

from environments import author

__all__ = ["author"]
