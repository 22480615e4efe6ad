"""Which settings of a composed run somebody gave, and where: on the command line or in a file of their own.

``+hybrid_lora=enabled`` is composed last, so what its group sets covers what a team's YAML says, and a value that
equals verl's default may have been meant or not. Composing once more, file by file, tells both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import verl
from omegaconf import DictConfig, OmegaConf

#: primary configurations of verl 0.9.1; another file in the same folder is a team's
VERLS_OWN = frozenset(
    {
        "evaluation",
        "ppo_megatron_trainer",
        "ppo_trainer",
        "sft_trainer_engine",
        "fully_async_ppo_megatron_trainer",
        "fully_async_ppo_trainer",
        "one_step_off_ppo_megatron_trainer",
        "one_step_off_ppo_trainer",
    }
)
COMMAND_LINE = "command line"


class Given(NamedTuple):
    """A setting that somebody gave."""

    #: as written, interpolations included
    value: Any
    #: the command line, or the file
    where: str


def given_settings(config: DictConfig, names: Iterable[str], default_of: Callable[[str], Any]) -> dict[str, Given]:
    """Those of ``names`` that the run's user gave, with the value that counts.

    Without Hydra's own node, as ``hydra.compose`` returns a configuration by default, nobody can tell who set a value:
    there, what differs from the defaults of verl and of the plugin counts as given.

    Args:
        config: as composed by Hydra.
        names: dotted names of settings.
        default_of: name -> the plugin's own default of a setting, None where it has none.
    """
    if "hydra" not in config:
        return _other_than_defaults(config, names, default_of)
    names = list(names)
    given: dict[str, Given] = {}
    for file, content in _files(config):
        for name in names:
            found, value = _raw(content, name)
            if not found:
                continue
            if file is None:
                # verl's, composed after the team's.
                given.pop(name, None)
            else:
                given[name] = Given(value, file)
    for key, value in _overrides(config):
        content = OmegaConf.create()
        OmegaConf.update(content, key, value, force_add=True)
        for name in names:
            found, own = _raw(content, name)
            if found:
                given[name] = Given(own, COMMAND_LINE)
    return given


def _raw(content: DictConfig, name: str) -> tuple[bool, Any]:
    """Whether a file sets ``name``, and its value with interpolations as they are written."""
    node: Any = content
    for part in name.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
            return False, None
        if part not in node._content:
            return False, None
        node = node._get_node(part)
    if node._is_missing():
        return False, None
    return True, OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()


def _files(config: DictConfig) -> Iterator[tuple[str | None, DictConfig]]:
    """Every file of the run in the order of composition, by the name to tell a user; None is one of verl's.

    Those of Hydra and of this plugin are left out.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra._internal.defaults_list import create_defaults_list

    search_path = ConfigSearchPathImpl()
    for source in config.hydra.runtime.config_sources:
        search_path.append(source.provider, f"{source.schema}://{source.path}")
    loader = ConfigLoaderImpl(config_search_path=search_path)
    name = config.hydra.job.config_name
    overrides = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
    # Each file is read once.
    parsed, files = loader._parse_overrides_and_create_caching_repo(name, overrides)
    listed = create_defaults_list(
        repo=files, config_name=name, overrides_list=parsed, prepend_hydra=True, skip_missing=False
    )
    for default in listed.defaults:
        loaded = loader._load_single_config(default=default, repo=files)
        if loaded.provider in ("hydra", "hybrid_lora") or str(loaded.path).startswith("structured:"):
            continue
        if _is_verls(loaded.path) and not (default.primary and default.config_path not in VERLS_OWN):
            yield None, loaded.config
        else:
            yield f"{default.config_path}.yaml", loaded.config


def _is_verls(path: str) -> bool:
    scheme, _, place = path.rpartition("://")
    if scheme == "pkg":
        return place == "verl" or place.startswith("verl.")
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(os.path.dirname(verl.__file__)))


def _overrides(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Settings of the command line, without choices of groups and what it removes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task)):
        if override.is_delete() or override.key_or_group in config.hydra.runtime.choices:
            continue
        yield override.key_or_group, override.value()


def _other_than_defaults(config: DictConfig, names: Iterable[str], default_of) -> dict[str, Given]:
    verls = verls_configuration("ppo_trainer" if "algorithm" in config else "sft_trainer_engine")
    given = {}
    for name in names:
        value = OmegaConf.select(config, name, throw_on_resolution_failure=False)
        if value != OmegaConf.select(verls, name) and value != default_of(name):
            given[name] = Given(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, "configuration")
    return given


@cache
def verls_configuration(primary: str) -> DictConfig:
    """What verl itself composes: its defaults.

    Args:
        primary: name of the file in ``verl/trainer/config``.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.types import RunMode

    search_path = ConfigSearchPathImpl()
    for provider, path in (("hydra", "pkg://hydra.conf"), ("main", "pkg://verl.trainer.config")):
        search_path.append(provider, path)
    search_path.append("schema", "structured://")
    return ConfigLoaderImpl(config_search_path=search_path).load_configuration(primary, [], RunMode.RUN)
