# SPDX-License-Identifier: Apache-2.0
"""Quantisation to fp8 and int8."""
