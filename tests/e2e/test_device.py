# SPDX-License-Identifier: Apache-2.0
"""The engine's device: what it is called here, who opens it, and the events that transfers wait for.  No GPU needed."""
import weakref
from types import SimpleNamespace

import pytest
import ucm
from test_bookkeeping import derived
from test_worker import Worker, transfer
from ucm.integration.vllm import device


@pytest.mark.parametrize("platform, device_type, name", [
    ("cpu", "cpu", "host"), ("cuda", "cuda", "cuda"), ("rocm", "cuda", "hip"), ("maca", "cuda", "maca"),
    ("npu", "npu", "ascend"), ("musa", "musa", "musa"), ("tpu", "tpu", None)])
def test_a_platform_has_its_device(monkeypatch, platform, device_type, name):
    monkeypatch.setattr(device, "current_platform", SimpleNamespace(device_name=platform, device_type=device_type))
    assert device.named(device_type) == name


def test_an_unknown_device_is_refused(monkeypatch):
    from ucm.integration.vllm.geometry import Unsupported

    monkeypatch.setattr(device, "named", lambda device_type: None)
    with pytest.raises(Unsupported, match="no device 'cpu'; `ucm doctor devices`"):
        derived()


def test_the_worker_opens_its_device_and_the_scheduler_none(monkeypatch):
    monkeypatch.setattr(device, "current_platform", SimpleNamespace(device_name="cuda", device_type="cuda"))
    monkeypatch.setattr(device.torch.accelerator, "current_device_index", lambda: 3)
    worker, scheduler, told = ucm.Conf(), ucm.Conf(), ucm.Conf()
    told.set("device", "cudart")
    worker.set("use_gdr", True)
    scheduler.set("use_gdr", True)
    device.settle(worker, "cuda", moves=True)
    device.settle(scheduler, "cuda", moves=False)
    device.settle(told, "cuda", moves=True)
    assert [worker.get(key) for key in ("device", "device_id")] == ["cuda", "3"]
    assert scheduler.get("device") == "host"
    assert [conf.get("use_gdr") for conf in (worker, scheduler)] == ["true", "false"]
    assert told.get("device") == "cudart"


class Event:
    made: list = []
    waited: list = []

    def __init__(self, device):
        assert device == "cuda"
        self.event_id = 0
        self.made.append(weakref.ref(self))

    def record(self):
        self.event_id = 1000 + len(self.made)

    def synchronize(self):
        self.waited.append(self.event_id)


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(device.torch, "Event", Event)
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(Event, "waited", [])


def test_transfers_wait_for_what_the_engine_has_queued(events):
    w = Worker(asynchronous=True, marks=device.Marks("cuda"))
    w.step(saves=[transfer("a", 0, 2)])
    w.step(loads=[transfer("b", 0, 1)])
    assert w.store.events == [1001, 1002] and not Event.waited
    save, load = w.store.dumps[0][-1], w.store.loads[0][-1]
    assert all(event() for event in Event.made)  # the device may still look at them
    save.released = load.released = True
    w.step(saves=[transfer("c", 0, 1)])
    assert [event() is not None for event in Event.made] == [False, False, True]


def test_without_event_sync_the_engine_waits(events):
    w = Worker(marks=device.Marks("cuda", events=False))
    w.step(saves=[transfer("a", 0, 2)])
    w.step(loads=[transfer("b", 0, 1)])
    assert w.store.events == [0, 0] and Event.waited == [1001, 1002]


def test_on_the_cpu_there_is_nothing_to_wait_for():
    w = Worker()
    w.step(saves=[transfer("a", 0, 2)])
    assert w.store.events == [0]
