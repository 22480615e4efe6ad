"""Compose many runs quickly: those that differ in values alone share what Hydra makes of their files.

Hydra applies values to the composed files last, so a copy of those with the values applied by Hydra's own function is
what Hydra itself would give; ``tests/test_launch_commands.py`` compares the two.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from omegaconf import DictConfig, OmegaConf, open_dict


class HydraBases:
    """Composed files, by where they are, which one is the first, and what is chosen among groups."""

    def __init__(self):
        self._composed: dict[tuple, DictConfig] = {}
        self._files: dict[tuple, list] = {}

    def compose(self, place: str, name: str, overrides: list[str]) -> DictConfig:
        """As ``hydra.compose`` with Hydra's own node.

        Args:
            place: an absolute folder, or a Python module.
            name: of the first file.
            overrides: as on a command line.
        """
        from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parsed = OverridesParser.create().parse_overrides(overrides)
        choices = [one.input_line for one in parsed if _is_choice(one)]
        key = (place, name, *choices)
        if key not in self._composed:
            self._composed[key] = compose_by_hydra(place, name, choices)
        config = copy.deepcopy(self._composed[key])
        ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if not _is_choice(one)], config)
        own = [one for one in parsed if not one.is_hydra_override()]
        with open_dict(config.hydra):
            config.hydra.overrides.task = [one.input_line for one in own]
            config.hydra.job.override_dirname = get_overrides_dirname(
                own, **OmegaConf.to_container(config.hydra.job.config.override_dirname)
            )
            config.hydra.runtime.cwd = os.getcwd()
        return config

    @contextmanager
    def files_looked_up_once(self) -> Iterator[None]:
        """Inside, ``given_settings`` reads the files of a base once: it reads them and changes nothing."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from hybrid_lora_plugin.verl_backend import given_settings

        original: Callable[[DictConfig], Iterator[tuple[str | None, DictConfig]]] = given_settings._files

        def files(config: DictConfig) -> list:
            parsed = OverridesParser.create().parse_overrides(
                [line for line in config.hydra.overrides.task if "." not in line.partition("=")[0]]
            )
            sources = [source.path for source in config.hydra.runtime.config_sources]
            key = (*sources, config.hydra.job.config_name, *(one.input_line for one in parsed))
            if key not in self._files:
                self._files[key] = list(original(config))
            return self._files[key]

        with mock.patch.object(given_settings, "_files", files):
            yield


def compose_by_hydra(place: str, name: str, overrides: list[str]) -> DictConfig:
    """``hydra.compose`` with Hydra's own node; arguments as ``HydraBases.compose``."""
    from hydra import compose, initialize_config_dir, initialize_config_module

    start = initialize_config_dir if os.path.isabs(place) else initialize_config_module
    with start(place, version_base=None):
        return compose(name, overrides=overrides, return_hydra_config=True)


def _is_choice(override: Any) -> bool:
    """Whether it chooses a file, or where files are looked for: verl has no value at the top of its configuration."""
    return override.is_hydra_override() or "." not in override.key_or_group
