# SPDX-License-Identifier: Apache-2.0
"""UcmPipelineStore: the stack of tiers that store_pipeline spells."""
