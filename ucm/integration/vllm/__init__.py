# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connector.  The class is ``ucm.integration.vllm.ucm_connector.UCMConnector``.

``ucm_connector``  the interface vLLM calls, split by role
``scheduler``      which blocks of a request to load and to save: bookkeeping, no data
``worker``         loads and dumps against the engine's tensors
``pace``           how long a load may take
``geometry``       what both must agree on: sizes, the namespace, what is not supported
``stats``          what is measured, for vLLM's log and for Prometheus
``lite``           the scheduler's side when hits are only counted
``messages``       what one side sends the other
``tier``           ucm below vLLM's own CPU tier, for OffloadingConnector instead of UCMConnector
``compat``         what differs between the versions of vLLM
"""
