# SPDX-License-Identifier: Apache-2.0
"""The configuration of an engine connector, as vLLM hands it over, turned into a Conf.

Names, types and ranges are checked by the core; here is only what a dict can be and a YAML file cannot.
"""

from ._ucm import Conf

FILE_KEY = "UCM_CONFIG_FILE"
_STORES = ("UcmPipelineStore", "UcmNfsStore")
_CONNECTOR_KEYS = ("ucm_connector_name", "ucm_connector_module_path")


def from_extra_config(extra, defaults=None):
    """The Conf that kv_connector_extra_config describes.

    {"UCM_CONFIG_FILE": path} names a YAML file; other keys are options, or the nesting of that file in line,
    and win over the file.  UCM_<KEY> in the environment wins over both.  defaults: where they differ from the core's.
    """
    if not extra:
        raise ValueError(
            'kv_connector_extra_config is empty: give {"UCM_CONFIG_FILE": "/path/to/ucm_config.yaml"}, or the '
            'options themselves, at least {"storage_backends": "/path/to/a/directory"}'
        )
    conf = Conf()
    set_all(conf, defaults or {})
    inline = dict(extra)
    path = inline.pop(FILE_KEY, None)
    if path is not None:
        conf.load(path)
    set_all(conf, flatten(inline))
    conf.env()
    _check_served(conf)
    if conf.get("use_lite") == "true":
        conf.set("store_pipeline", "Fake")
    return conf


def _check_served(conf):
    """Refuses what an engine would be surprised to run without; of lesser things the core warns."""
    name, module = conf.get("ucm_connector_name"), conf.get("ucm_connector_module_path")
    if module or name not in _STORES:
        key, value = ("ucm_connector_module_path", module) if module else ("ucm_connector_name", name)
        raise ValueError(f"{key}: {value!r}: engines work with ucm's own stores only; give ucm_connector_name: "
                         "UcmPipelineStore, without ucm_connector_module_path")
    if "Fake" in conf.get("store_pipeline").split("|") and conf.get("use_lite") != "true":
        raise ValueError("store_pipeline: Fake remembers keys and has no data, so an engine would wait for hits that "
                         "cannot be loaded; give Cache|Posix, or use_lite: true to count what would be hits")


def set_all(conf, values):
    """Sets each of values; None leaves an option as it is, a list is joined by ':'."""
    for key, value in values.items():
        if value is not None:
            conf.set(key, _joined(key, value) if isinstance(value, (list, tuple)) else value)


def flatten(nested):
    """One flat dict out of the nesting of ucm_config_example.yaml (which may be flat already)."""
    flat = {key: value for key, value in nested.items() if key != "ucm_connectors"}
    if "ucm_connectors" not in nested:
        return flat
    connector = _only_connector(nested["ucm_connectors"])
    options = connector.get("ucm_connector_config") or {}
    if not isinstance(options, dict):
        raise ValueError(f"ucm_connector_config: a dict of options is needed, not {options!r}")
    for source in ({key: connector.get(key) for key in _CONNECTOR_KEYS}, options):
        for key, value in source.items():
            if key in flat:
                raise ValueError(f"{key}: given twice, in ucm_connectors and beside it; keep one")
            flat[key] = value
    return flat


def _only_connector(connectors):
    if not isinstance(connectors, (list, tuple)) or len(connectors) != 1 or not isinstance(connectors[0], dict):
        raise ValueError("ucm_connectors: a list of exactly one dict is needed (store_pipeline stacks tiers)")
    connector = connectors[0]
    if not connector.get("ucm_connector_name"):
        raise ValueError("ucm_connectors: ucm_connector_name is missing; give UcmPipelineStore")
    for key in connector:
        if key not in _CONNECTOR_KEYS and key != "ucm_connector_config":
            raise ValueError(f"{key}: not expected in ucm_connectors; options go into ucm_connector_config")
    return connector


def _joined(key, items):
    texts = [str(item) for item in items]
    for text in texts:
        if not text or ":" in text:
            raise ValueError(f"{key}: {text!r} cannot be an item of a list: items are joined by ':'")
    return ":".join(texts)
