# SPDX-License-Identifier: Apache-2.0
"""The plugin API: one hook that returns one frozen value."""

from __future__ import annotations

import pluggy

from opmux.kernel import Backend

hookspec = pluggy.HookspecMarker("opmux")
hookimpl = pluggy.HookimplMarker("opmux")


@hookspec
def opmux_backend() -> Backend:  # type: ignore[empty-body]
    """Return the backend. Touch no device and load no library."""
