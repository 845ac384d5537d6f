# SPDX-License-Identifier: Apache-2.0
"""The device that an engine's KV cache is on: what ucm calls it, and the marks of what the engine has queued there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform

from ucm import Conf

# vLLM's names of platforms, and PyTorch's of devices where a platform is known by no other.
_NAMES = {"cpu": "host", "cuda": "cuda", "rocm": "hip", "npu": "ascend", "musa": "musa", "maca": "maca"}


def named(device_type: str) -> str | None:
    """None: there is no such device.  Several platforms call theirs cuda, so the platform's name goes first."""
    platform = current_platform.device_name if current_platform.device_type == device_type else device_type
    return _NAMES.get(platform.lower())


def settle(conf: Conf, device_type: str, moves: bool) -> None:
    """Fills in `device: auto`.  A process that moves no blocks needs no device, and takes no memory there."""
    if not moves:
        conf.set("device", "host")
        conf.set("use_gdr", False)  # nor a warning about it
        return
    if conf.get("device") == "auto":
        conf.set("device", named(device_type))
    if device_type != "cpu":
        conf.set("device_id", torch.accelerator.current_device_index())


class Marks:
    """What a load or dump is to wait for: all that the engine has queued by now.  On the CPU that is over.
    Either the device waits (events), or whoever submits, here and now."""

    def __init__(self, device_type: str, events: bool = True):
        self._device = None if device_type == "cpu" else device_type
        self._events = events
        self._kept: list[tuple[Any, torch.Event]] = []  # an event lives as long as a task may wait for it

    def after(self, submit: Callable[[int], Any]) -> Any:
        if self._device is None:
            return submit(0)
        event = torch.Event(self._device)
        event.record()
        if not self._events:
            event.synchronize()
            return submit(0)
        task = submit(event.event_id)
        self._kept = [kept for kept in self._kept if not kept[0].done("released")] + [(task, event)]
        return task
