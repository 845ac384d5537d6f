# SPDX-License-Identifier: Apache-2.0
import errno

import pytest

import ucm


def test_values_of_each_type_become_text():
    conf = ucm.Conf({"block_size": 4096, "use_layerwise": False, "hit_ratio": 0.5, "namespace": "a b"})
    got = [conf.get(k) for k in ("block_size", "use_layerwise", "hit_ratio", "namespace")]
    assert got == ["4096", "false", "0.5", "a b"]


@pytest.mark.parametrize("value", [None, b"x", [1], {}])
def test_other_types_are_refused_by_name(value):
    with pytest.raises(TypeError, match="^block_size: "):
        ucm.Conf().set("block_size", value)


def test_unknown_key_names_the_nearest():
    with pytest.raises(OSError, match="blok_size.*did you mean block_size") as e:
        ucm.Conf({"blok_size": 1})
    assert e.value.errno == errno.EINVAL


def test_a_refused_value_changes_nothing():
    conf = ucm.Conf({"timeout_ms": 5})
    with pytest.raises(OSError, match="timeout_ms"):
        conf.set("timeout_ms", "soon")
    assert conf.get("timeout_ms") == "5"


def test_get_of_an_unknown_key():
    with pytest.raises(KeyError, match="nothing"):
        ucm.Conf().get("nothing")


def test_zero_characters_are_refused():
    with pytest.raises(ValueError, match="zero character"):
        ucm.Conf({"namespace": "a\0b"})
    with pytest.raises(ValueError, match="zero character"):
        ucm.Conf().get("namespace\0")


@pytest.mark.parametrize("call", [lambda: ucm.Conf(value={}), lambda: ucm.Conf({}, {}), lambda: ucm.Conf([])])
def test_wrong_arguments(call):
    with pytest.raises(TypeError):
        call()


def test_options_describe_themselves():
    options = {o["name"]: o for o in ucm.Conf({"block_size": 8}).options()}
    o = options["block_size"]
    assert (o["owner"], o["value"], o["default"], o["given"], o["obsolete"]) == ("store", "8", "0", True, False)
    assert o["help"] and not options["rank"]["given"] and options["posix_gc_enable"]["obsolete"]


def test_file_then_set_then_environment(tmp_path, monkeypatch):
    path = tmp_path / "ucm.yaml"
    path.write_text("block_size: 1\nshard_size: 1\ntimeout_ms: 1\n")
    conf = ucm.Conf()
    conf.load(path)
    conf.set("shard_size", 2)
    conf.set("timeout_ms", 2)
    monkeypatch.setenv("UCM_TIMEOUT_MS", "3")
    conf.env()
    assert [conf.get(k) for k in ("block_size", "shard_size", "timeout_ms")] == ["1", "2", "3"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        ucm.Conf().load(tmp_path / "none.yaml")


def test_wrong_line_of_a_file_is_named(tmp_path):
    path = tmp_path / "ucm.yaml"
    path.write_text("block_size: 1\nblok_size: 1\n")
    with pytest.raises(OSError, match=r"ucm\.yaml:2"):
        ucm.Conf().load(path)


def test_open_says_what_is_wrong():
    with pytest.raises(OSError, match='store_pipeline: .*"Nothing"'):
        ucm.Store({"store_pipeline": "Nothing", "block_size": 8})
    with pytest.raises(TypeError, match="conf: "):
        ucm.Store("Fake")
