"""Whether this package's reward function can judge the rows of a run, found out on the driver before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.rewards import verl_reward
from hybrid_lora_plugin.rewards.scorer import Scorer

_MODULE = verl_reward.__name__
#: Where a run names its reward function; verl still reads the second, of earlier versions.
_PLACES = ("reward.custom_reward_function", "custom_reward_function")


def check_rewards(config: DictConfig) -> None:
    """Refuse options of the reward that do not exist, and rows that nothing here can judge.

    A run with another reward function is not looked at. Rows are known where the files are local Parquet; on other
    nodes the first response finds out.

    Raises:
        ConfigurationError: an option, or a row whose kind is not known.
        RewardError: math-verify or a sandbox is missing, with the ways out.
    """
    given = next((node for node in (OmegaConf.select(config, place) for place in _PLACES) if _is_ours(node)), None)
    if given is None:
        return
    given_kwargs = OmegaConf.to_container(given.get("reward_kwargs") or OmegaConf.create({}), resolve=True)
    options, limits = verl_reward.settings(given_kwargs)
    with Scorer(limits, unsandboxed_code=options.unsandboxed_code) as scorer:
        scorer.prepare(_kinds(config))


def _is_ours(node: Any) -> bool:
    path = str((node or {}).get("path") or "").removeprefix("pkg://").removeprefix("file://")
    return path.removesuffix(".py").replace("/", ".").endswith(_MODULE)


def _kinds(config: DictConfig) -> set[str]:
    kinds = set()
    for name in ("data.train_files", "data.val_files"):
        for file in _local_files(OmegaConf.select(config, name)):
            for source, about in _pairs(file):
                try:
                    kinds.add(verl_reward.kind_of(source, about))
                except ConfigurationError as error:
                    raise ConfigurationError.relayed(
                        f"{name}: {file}: {error}", otherwise="reward-option-not-usable"
                    ) from error
    return kinds


def _local_files(given: Any) -> list[str]:
    files = [given] if isinstance(given, str) else list(given or [])
    return [os.path.expanduser(str(file)) for file in files if os.path.isfile(os.path.expanduser(str(file)))]


def _pairs(file: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """What the rows of a Parquet file say of their kind, each once; nothing of a file of another form."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError):
        return
    names = set(parquet.schema_arrow.names)
    if "data_source" not in names:
        return
    column = parquet.schema_arrow.field("extra_info").type if "extra_info" in names else None
    says = column is not None and pyarrow.types.is_struct(column) and column.get_field_index("kind") >= 0
    seen: set[tuple[str, Any]] = set()
    for batch in parquet.iter_batches(columns=["data_source", "extra_info.kind"] if says else ["data_source"]):
        sources = batch.column("data_source").to_pylist()
        abouts = batch.column("extra_info").to_pylist() if says else [None] * len(sources)
        for source, about in zip(sources, abouts, strict=True):
            key = (source, (about or {}).get("kind"))
            if key not in seen:
                seen.add(key)
                yield source, about
