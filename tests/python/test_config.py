# SPDX-License-Identifier: Apache-2.0
import pytest

from ucm.config import from_extra_config

NESTED = {
    "ucm_connectors": [
        {
            "ucm_connector_name": "UcmPipelineStore",
            "ucm_connector_config": {"store_pipeline": "Cache|Posix", "storage_backends": "/mnt/test"},
        }
    ],
    "use_layerwise": False,
}
YAML = """
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "/mnt/test"
use_layerwise: false
"""


def values(conf, *keys):
    return [conf.get(key) for key in keys]


KEYS = ("ucm_connector_name", "store_pipeline", "storage_backends", "use_layerwise")
WANT = ["UcmPipelineStore", "Cache|Posix", "/mnt/test", "false"]


def test_nesting_in_line():
    assert values(from_extra_config(NESTED), *KEYS) == WANT


def test_the_same_in_a_file(tmp_path):
    path = tmp_path / "ucm.yaml"
    path.write_text(YAML)
    assert values(from_extra_config({"UCM_CONFIG_FILE": str(path)}), *KEYS) == WANT


def test_flat_keys():
    flat = {**NESTED["ucm_connectors"][0]["ucm_connector_config"], "use_layerwise": False}
    assert values(from_extra_config(flat), *KEYS) == WANT


def test_in_line_wins_over_the_file_and_the_environment_over_both(tmp_path, monkeypatch):
    path = tmp_path / "ucm.yaml"
    path.write_text(YAML + "timeout_ms: 1\nlookup_timeout_ms: 1\n")
    monkeypatch.setenv("UCM_LOOKUP_TIMEOUT_MS", "3")
    extra = {"UCM_CONFIG_FILE": str(path), "timeout_ms": 2, "lookup_timeout_ms": 2}
    assert values(from_extra_config(extra), "use_layerwise", "timeout_ms", "lookup_timeout_ms") == ["false", "2", "3"]


def test_lists_are_joined_and_none_is_the_default():
    conf = from_extra_config({"storage_backends": ["/a", "/b"], "timeout_ms": None})
    assert values(conf, "storage_backends", "timeout_ms") == ["/a:/b", "30000"]


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_given_says_what_to_give(nothing):
    with pytest.raises(ValueError, match="UCM_CONFIG_FILE.*storage_backends"):
        from_extra_config(nothing)


def test_missing_file_is_said_as_that():
    with pytest.raises(FileNotFoundError, match="/nowhere/ucm.yaml"):
        from_extra_config({"UCM_CONFIG_FILE": "/nowhere/ucm.yaml"})


@pytest.mark.parametrize("extra, why", [
    ({"ucm_connectors": []}, "exactly one"),
    ({"ucm_connectors": [{}, {}]}, "exactly one"),
    ({"ucm_connectors": {}}, "exactly one"),
    ({"ucm_connectors": [{"ucm_connector_config": {}}]}, "ucm_connector_name is missing"),
    ({"ucm_connectors": [{"ucm_connector_name": "x", "block_size": 1}]}, "block_size: not expected"),
    ({"ucm_connectors": [{"ucm_connector_name": "x", "ucm_connector_config": [1]}]}, "a dict of options"),
    ({**NESTED, "store_pipeline": "Posix"}, "store_pipeline: given twice"),
    ({"storage_backends": ["/a:b"]}, "cannot be an item"),
    ({"storage_backends": ["/a", ""]}, "cannot be an item"),
])  # fmt: skip
def test_wrong_shapes(extra, why):
    with pytest.raises(ValueError, match=why):
        from_extra_config(extra)


@pytest.mark.parametrize("extra, why", [
    ({"store_pipeline": "Cache|Fake"}, "^store_pipeline: Fake .*give Cache.Posix"),
    ({"ucm_connector_name": "UcmPipelinStore"}, "^ucm_connector_name: 'UcmPipelinStore'.*give.*UcmPipelineStore"),
    ({"ucm_connector_module_path": "my.store"}, "^ucm_connector_module_path: 'my.store'.*without"),
])  # fmt: skip
def test_what_is_not_served_is_refused(extra, why):
    with pytest.raises(ValueError, match=why):
        from_extra_config({"storage_backends": "/a", **extra})


def test_what_is_slower_without_is_accepted_without():
    assert from_extra_config({"use_gdr": True, "storage_backends": "/a"}).get("use_gdr") == "true"


def test_counting_hits_takes_a_memory_of_keys_for_the_store():
    assert from_extra_config({"use_lite": True, "storage_backends": "/a"}).get("store_pipeline") == "Fake"
    assert from_extra_config({"storage_backends": "/a"}).get("store_pipeline") == "Cache|Posix"


def test_other_defaults_yield_to_what_is_given(tmp_path):
    mine = {"store_pipeline": "Posix"}
    assert from_extra_config({"storage_backends": "/a"}, mine).get("store_pipeline") == "Posix"
    path = tmp_path / "ucm.yaml"
    path.write_text("store_pipeline: Cache|Posix\nstorage_backends: /a\n")
    assert from_extra_config({"UCM_CONFIG_FILE": str(path)}, mine).get("store_pipeline") == "Cache|Posix"


def test_wrong_options_are_the_cores_to_refuse():
    with pytest.raises(OSError, match="did you mean storage_backends"):
        from_extra_config({"storage_backend": "/a"})
    with pytest.raises(TypeError, match="storage_backends"):
        from_extra_config({"storage_backends": {"a": 1}})
