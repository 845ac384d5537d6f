# SPDX-License-Identifier: Apache-2.0
"""Store classes by name."""

import importlib

from ucm.store.ucmstore_v1 import UcmKVStoreBaseV1


class UcmConnectorFactoryV1:
    _registry = {}

    @classmethod
    def register_connector(cls, name, module_path, class_name):
        """Makes class_name of module_path known as name; it is imported when first created."""
        if name in cls._registry:
            raise ValueError(f"connector {name!r} is registered already")
        cls._registry[name] = (module_path, class_name)

    @classmethod
    def create_connector(cls, connector_name, config, module_path=None):
        """A store by its registered name, or by the name of its class in module_path."""
        class_name = connector_name
        if module_path is None:
            if connector_name not in cls._registry:
                known = ", ".join(sorted(cls._registry))
                raise ValueError(f"Unsupported connector type: {connector_name!r}; there are {known}")
            module_path, class_name = cls._registry[connector_name]
        store = getattr(importlib.import_module(module_path), class_name, None)
        if not (isinstance(store, type) and issubclass(store, UcmKVStoreBaseV1)):
            raise TypeError(f"{module_path} has no class {class_name} derived from UcmKVStoreBaseV1")
        return store(config)


UcmConnectorFactoryV1.register_connector(
    "UcmPipelineStore", "ucm.store.pipeline.connector", "UcmPipelineStore"
)
UcmConnectorFactoryV1.register_connector("UcmNfsStore", "ucm.store.nfsstore.connector", "UcmNfsStore")
