# SPDX-License-Identifier: Apache-2.0
"""Routing and data movement of mixtures of experts."""
