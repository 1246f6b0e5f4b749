# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several files share."""

from environments import author, jobs, outcome

__all__ = ["author", "jobs", "outcome"]
