# SPDX-License-Identifier: Apache-2.0
"""UcmNfsStore under its documented name: a directory, local or shared, behind the DRAM tier."""

from ucm.store.pipeline.connector import UcmPipelineStore


class UcmNfsStore(UcmPipelineStore):
    """The default store_pipeline, Cache|Posix, is what the name stands for."""
