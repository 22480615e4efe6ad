"""The training prompts of a policy probe: warm-up prompts first, then prompts that the warm-up never saw.

A warm-up that finds its own length is looked at with the first of these prompts, each time the same ones.

verl has no hook for a sampler, but one for the dataset class (``data.custom_cls``, verl
``utils/dataset/rl_dataset.py``). This one wraps the class that the run itself uses and puts its rows in order.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.import_utils import load_extern_object

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.seeding import generator
from hybrid_lora_plugin.verl_backend.probe.policy_schedule import WARM_UP, PolicySchedule, read_ended


def prompt_order(rows: int, batch_size: int, warmup_steps: int, scoring_steps: int, seed: int) -> list[int]:
    """Row numbers in the order of use: ``warmup_steps`` batches, then ``scoring_steps`` batches of other rows.

    Args:
        rows: of the dataset.
        batch_size: prompts of a step.
        warmup_steps, scoring_steps: steps.
        seed: decides the split and the order; the warm-up is shuffled anew whenever its rows are used up.

    Raises:
        ConfigurationError: the dataset has too few rows for one warm-up batch beside the held-out ones.
    """
    held_out = scoring_steps * batch_size
    if rows < held_out + (batch_size if warmup_steps else 0):
        raise ConfigurationError(
            f"data.train_files: {rows} prompts, but a policy probe holds out {held_out} ({scoring_steps} steps of "
            f"{batch_size}) and needs a batch beside them; give more prompts, or lower hybrid_lora.probe.partitions or "
            f"data.train_batch_size",
            see="policy-probe-not-possible",
        )
    split = torch.randperm(rows, generator=generator(seed, "held-out prompts"))
    training = split[held_out:]
    order: list[int] = []
    epoch = 0
    while len(order) < warmup_steps * batch_size:
        order += training[torch.randperm(len(training), generator=generator(seed, "prompts", epoch))].tolist()
        epoch += 1
    return order[: warmup_steps * batch_size] + split[:held_out].tolist()


class HeldOutPrompts(Dataset):
    """The run's own dataset; as training set in the order of ``prompt_order``, as validation set unchanged."""

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1):
        probe = config.hybrid_lora
        inner = RLHFDataset
        if probe.custom_cls_path is not None:
            inner = load_extern_object(probe.custom_cls_path, probe.custom_cls_name)
        # The run's own choice of rows: of a limited number, verl draws at random if it shuffles.
        own = OmegaConf.merge(config, {"shuffle": probe.shuffle})
        self._inner = inner(
            data_files=data_files, tokenizer=tokenizer, processor=processor, config=own, max_samples=max_samples
        )
        self._order, self._schedule = list(range(len(self._inner))), None
        if data_files == config.train_files:
            self._schedule = PolicySchedule(
                probe.warmup_steps, probe.check_every, probe.check_steps, probe.scoring_steps
            )
            self._batch, self._folder = config.train_batch_size, probe.folder
            self._order = prompt_order(
                len(self._inner), self._batch, probe.warmup_steps, probe.scoring_steps, probe.seed
            )

    def __len__(self) -> int:
        return len(self._order) if self._schedule is None else self._schedule.steps * self._batch

    def __getitem__(self, index: int) -> Any:
        return self._inner[self._order[index if self._schedule is None else self._place(index)]]

    def _place(self, index: int) -> int:
        """Where in the order the prompt of a position is: in the warm-up's, or among the held-out ones behind them."""
        step, within = divmod(index, self._batch)
        # Asked each time: the engine leaves a note in the middle of an epoch.
        ended = read_ended(self._folder) if self._schedule.every else None
        stage, number = self._schedule.stage(step, ended)
        # A probe that was written goes on until its process is ended.
        number = number if stage == WARM_UP else self._schedule.warmup + number % self._schedule.scoring
        return number * self._batch + within

    def __getattr__(self, name: str) -> Any:
        # Whatever else a trainer asks of a dataset of the run's own class.
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)
