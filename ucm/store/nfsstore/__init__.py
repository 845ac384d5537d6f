# SPDX-License-Identifier: Apache-2.0
"""UcmNfsStore: a stack over a directory."""
