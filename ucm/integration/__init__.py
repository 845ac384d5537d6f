# SPDX-License-Identifier: Apache-2.0
"""Connectors: one package for each engine.  Importing this one imports no engine."""
