# SPDX-License-Identifier: Apache-2.0
"""The documented store classes, thin covers over ucm.Store."""
