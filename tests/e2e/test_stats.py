# SPDX-License-Identifier: Apache-2.0
"""What is measured: what a meter makes of the store, what is handed on, and what Prometheus is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from engine import UCM
from models import prompt
from support import BLOCK, geometry

METRICS = Path(__file__).parents[2] / "examples" / "metrics"
YAML = METRICS / "metrics_configs.yaml"


class FakeTask:
    def __init__(self):
        self.times: dict[str, float] = {}

    def done(self, stage):
        return stage in self.times

    def elapsed(self, stage):
        return self.times[stage]


class FakeStore:
    block_size = 1000

    def __init__(self):
        self.counts = {"load_bytes_total": 0.0, "disk_blocks": 0.0}
        self.tasks: list[FakeTask] = []
        self.error: OSError | None = None

    def metrics(self):
        return dict(self.counts)

    def lookup(self, keys):
        if self.error:
            raise self.error
        return bytes(len(keys) // 16)

    def dump(self, where, keys, blocks, depths):
        self.tasks.append(FakeTask())
        return self.tasks[-1]

    load = dump


def meter(**kwargs):
    from ucm.integration.vllm.stats import Meter

    store = FakeStore()
    return store, Meter(store, "0", **kwargs)


def test_growth_is_handed_on_once():
    store, m = meter(interval_s=0)
    assert m.take().data == {"0": {"load_bytes_total": 0, "disk_blocks": 0}}  # so that they are seen from the start
    assert m.take() is None
    store.counts.update(load_bytes_total=5.0, disk_blocks=2.0)
    assert m.take().data == {"0": {"load_bytes_total": 5.0, "disk_blocks": 2.0}}
    assert m.take() is None
    store.counts.update(load_bytes_total=7.0, disk_blocks=1.0)
    assert m.take().data == {"0": {"load_bytes_total": 2.0, "disk_blocks": 1.0}}


def test_a_step_that_moved_nothing_does_not_look_at_the_store():
    store, m = meter(interval_s=3600)
    m.take()
    store.counts["load_bytes_total"] = 5.0
    assert m.take() is None
    m.lookup(bytes(16))
    assert m.take().data["0"].keys() == {"lookup_duration", "load_bytes_total"}


def test_a_transfer_is_measured_when_it_has_ended():
    store, m = meter(interval_s=3600)
    m.take()
    m.dump(None, bytes(32), None, None)
    assert m.take() is None
    store.tasks[0].times["released"] = 0.5
    assert m.take() is None
    store.tasks[0].times["stored"] = 2.0
    assert m.take().data["0"] == {
        "save_duration": [500.0], "save_speed": [4e-6], "save_stored_duration": [2000.0]}
    assert m.take() is None


def test_what_nobody_takes_does_not_grow():
    """The wrapper of vllm-ascend does not ask."""
    from ucm.integration.vllm.stats import MOST

    store, m = meter(interval_s=3600)
    for _ in range(2 * MOST):
        m.dump(None, bytes(16), None, None)
        m.lookup(bytes(16))
    assert len(m._transfers) == MOST
    for task in store.tasks:
        task.times = {"released": 1.0, "stored": 1.0}
    assert {len(samples) for samples in m.take().data["0"].values() if isinstance(samples, list)} == {MOST}


def test_a_failing_lookup_is_counted():
    store, m = meter(interval_s=3600)
    m.take()
    store.error = OSError(5, "broken")
    for _ in range(2):
        with pytest.raises(OSError):
            m.lookup(bytes(16))
    assert m.take().data["0"]["lookup_errors_total"] == 2


def test_lost_lines_of_traces_are_counted():
    from types import SimpleNamespace

    from ucm.integration.vllm.ucm_connector import UCMConnector

    store, m = meter(interval_s=3600)
    m.take()
    connector = SimpleNamespace(
        _meter=m, _traces=SimpleNamespace(record=lambda *line: None, lost=iter([2, 0, 3]).__next__),
        _scheduler=SimpleNamespace(prompt_keys=lambda request: b"", finished=lambda request, blocks: False))
    request = SimpleNamespace(arrival_time=0, num_prompt_tokens=0, num_output_tokens=0)
    for _ in range(3):
        UCMConnector.request_finished_all_groups(connector, request, ([],))
    assert m.take().data["0"]["traces_lost_total"] == 5


def test_stats_of_several_workers_add_up():
    from ucm.integration.vllm.stats import Stats

    a = Stats(data={"0": {"load_bytes_total": 2e6, "load_duration": [500], "disk_blocks": 3}})
    b = Stats(data={"0": {"load_bytes_total": 1e6, "load_duration": [250, 250], "disk_blocks": 4},
                    "1": {"load_failed_total": 1}})
    a.aggregate(b)
    assert a.data == {"0": {"load_bytes_total": 3e6, "load_duration": [500, 250, 250], "disk_blocks": 4},
                      "1": {"load_failed_total": 1}}
    assert a.reduce() == {"blocks loaded": 0, "MB loaded": 3.0, "MB/s loaded": 3.0, "blocks not loaded": 1}
    a.reset()
    assert a.is_empty() and a.reduce() == {}


def prometheus(path):
    from types import SimpleNamespace

    from prometheus_client import Counter, Gauge, Histogram
    from ucm.integration.vllm.stats import PromMetrics, Shown

    types = {t: t for t in (Counter, Gauge, Histogram)}
    return PromMetrics(Shown.read(str(path)), SimpleNamespace(kv_transfer_config=None), types, ["model_name", "engine"],
                       {0: ["m", "0"]})


@pytest.mark.parametrize("text, said", [
    (None, "No such file"), ("[", "expected"), ("- 1", "no metrics of ucm"), ("counter: [{}]", "KeyError"),
    ("gauge: [{name: load_bytes_total}]", "it is a counter"),
    ("histogram: [{name: load_duration, buckets: [5, 1]}]", "load_duration is not shown"),
])
def test_a_wrong_file_ends_nothing(tmp_path, caplog, text, said):
    path = tmp_path / "metrics.yaml"
    if text is not None:
        path.write_text(text)
    prometheus(path).observe({"0": {"load_bytes_total": 1, "load_duration": [1]}})
    assert said in caplog.text


def test_a_metric_that_does_not_exist_is_named(tmp_path, caplog):
    from ucm.integration.vllm.stats import Shown

    path = tmp_path / "metrics.yaml"
    path.write_text("counter: [{name: load_bytes_total}, {name: lode_bytes_total}]")
    Shown.read(str(path)).warn_of_unknown(str(path), FakeStore())
    assert "there are no metrics lode_bytes_total" in caplog.text


def test_prefix_labels_and_a_second_engine_in_the_process(tmp_path):
    from prometheus_client import REGISTRY

    path = tmp_path / "metrics.yaml"
    path.write_text("metric_prefix: 'x:'\ncounters: [{name: load_bytes_total}]\n"
                    "histogram: [{name: load_duration, buckets: [1, 2]}]")
    for _ in range(2):
        shown = prometheus(path)
        shown.observe({"3": {"load_bytes_total": 5, "load_duration": [1.5], "dump_bytes_total": 1}})
    labels = {"model_name": "m", "engine": "0", "worker_id": "3"}
    assert REGISTRY.get_sample_value("x:load_bytes_total", labels) == 5
    assert REGISTRY.get_sample_value("x:load_duration_bucket", {**labels, "le": "2.0"}) == 1
    assert REGISTRY.get_sample_value("x:dump_bytes_total", labels) is None
    prometheus("")
    assert REGISTRY.get_sample_value("x:load_bytes_total", labels) is None


def test_the_example_names_every_metric(open_fake):
    from ucm.integration.vllm.stats import MEASURED, kind_of

    config = yaml.safe_load(YAML.read_text())
    named = {item["name"]: kind for kind in ("counter", "gauge", "histogram") for item in config[kind]}
    assert named.keys() == {*open_fake.metrics(), *MEASURED}
    assert all(kind == kind_of(name) for name, kind in named.items())


def samples(text: str) -> dict[str, float]:
    """Of what /metrics says, ours: name -> sum over all labels."""
    out: dict[str, float] = {}
    for name, value in re.findall(r"^(ucm:\w+)\{[^}]*\} (\S+)$", text, re.M):
        out[name] = out.get(name, 0) + float(value)
    return out


def shown_after(life, prompts) -> dict[str, float]:
    """The metrics when all of this has ended and been handed on, with a step that does nothing else."""
    life.call("ask", prompts)
    life.call("save")
    life.call("ask", [prompt(40, 99)])
    return samples(life.call("scrape"))


@pytest.mark.parametrize("layerwise, pipeline", [(True, "Cache|Posix"), (False, "Posix")])
def test_a_real_engine(deploy, layerwise, pipeline):
    """Values after a known load: 7 blocks are stored; then, by a new process, loaded, and 3 more stored; then
    all 10 loaded from the fastest tier."""
    d = deploy({"store_pipeline": pipeline}, use_layerwise=layerwise, metrics_config_path=str(YAML))
    p, block = prompt(7 * BLOCK + 50, 1), 1 << 19
    with d.life() as life:
        m = shown_after(life, [p])
        assert m["ucm:save_blocks_num_sum"] == m["ucm:disk_writes_total"] == 7
        assert m["ucm:dump_bytes_total"] == 7 * block and m["ucm:load_bytes_total"] == 0
        assert (m["ucm:save_duration_count"], m["ucm:save_stored_duration_count"]) == (1, 1)
        assert (m["ucm:interval_lookup_hit_rates_sum"], m["ucm:lookup_hits_total"]) == (0, 0)
    with d.life() as life:
        m = shown_after(life, [p + prompt(3 * BLOCK, 2)])
        assert m["ucm:load_blocks_num_sum"] == 7 and m["ucm:save_blocks_num_sum"] == 3
        assert m["ucm:load_bytes_total"] == 7 * block and m["ucm:load_duration_count"] == 1
        assert (m["ucm:hit_dram_tokens_total"], m["ucm:hit_slower_tokens_total"]) == (0, 7 * BLOCK)
        assert m["ucm:interval_lookup_hit_rates_sum"] == 0.7
        m = shown_after(life, [p + prompt(3 * BLOCK, 2)])
        again = (10, 7) if pipeline == "Cache|Posix" else (0, 17)
        assert (m["ucm:hit_dram_tokens_total"], m["ucm:hit_slower_tokens_total"]) == tuple(n * BLOCK for n in again)
        assert m["ucm:load_failed_total"] == m["ucm:dump_dropped_total"] == m["ucm:lookup_errors_total"] == 0
        assert_dashboard_shows(m)


def assert_dashboard_shows(shown: dict[str, float]) -> None:
    """Every metric that the dashboard asks for is there."""
    asked = asked_by_dashboard()
    assert len(asked) > 20 and asked <= shown.keys(), asked - shown.keys()


def asked_by_dashboard() -> set[str]:
    return set(re.findall(r"ucm:\w+", " ".join(t["expr"] for p in dashboard()["panels"] for t in p.get("targets", []))))


def dashboard() -> dict:
    return json.loads((METRICS / "grafana.json").read_text())


def test_the_dashboard_shows_rates_and_quantiles():
    panels = [p for p in dashboard()["panels"] if p["type"] != "row"]
    assert len({p["id"] for p in panels}) == len(panels)
    for p in panels:
        assert p["title"] and p["targets"] and p["datasource"]["uid"] == "${DS_PROMETHEUS}"
        for t in p["targets"]:
            for counter in re.findall(r"(ucm:\w+_(?:total|bucket|count|sum))[{]", t["expr"]):
                assert re.search(rf"(rate|increase)\({counter}[{{]", t["expr"]), t["expr"]
            assert 'model_name=~"$model_name"' in t["expr"]
    exprs = [t["expr"] for p in panels for t in p["targets"]]
    for name in ("load_duration", "save_duration", "save_stored_duration", "lookup_duration", "interval_lookup_hit_rates"):
        assert any("histogram_quantile" in e and f"ucm:{name}_bucket" in e for e in exprs), name


def test_the_dashboard_shows_all_that_the_connector_counts():
    from ucm.integration.vllm.stats import MEASURED

    assert {name.removesuffix("_bucket") for name in asked_by_dashboard()} >= {f"ucm:{name}" for name in MEASURED}


def test_prometheus_configuration():
    (job,) = yaml.safe_load((METRICS / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"]


def test_each_transfer_is_in_the_log_when_asked_for(deploy):
    """In the format that is documented, though vLLM's own log goes to INFO only."""
    d = deploy()
    with d.life(environment={"UC_LOGGER_LEVEL": "debug"}) as life:
        life.call("ask", [prompt(2 * BLOCK + 50, 1)])
        life.call("save")
    said = life.log.read_text()
    for tier, operation in (("Cache", "DUMP"), ("Posix", "Cache2Backend")):
        for end in ("dispatching", r"finished, cost [\d.]+ms"):
            line = rf"{tier} task\(\d+,{operation},2,\d+\) {end}\."
            framed = re.findall(rf"^\[.*\]\[UC\]\[D\] {line} \[{life.pid},\d+\]$", said, re.M)
            assert len(re.findall(line, said)) == 1 and len(framed) == 1


def test_beside_another_connector(deploy):
    """MultiConnector hands statistics on by the name of the class, and ends the process that does not know it."""
    d = deploy(metrics_config_path=str(YAML))
    d.config = {"connectors": [{**UCM, "kv_role": "kv_both", "kv_connector_extra_config": d.config}]}
    with d.life() as life:
        life.call("ask", [prompt(300, 1)])
        assert samples(life.call("scrape"))["ucm:save_blocks_num_sum"] == 2


@pytest.fixture
def open_fake():
    import ucm

    with ucm.Store({"store_pipeline": "Fake", "block_size": geometry().block_size}) as store:
        yield store
