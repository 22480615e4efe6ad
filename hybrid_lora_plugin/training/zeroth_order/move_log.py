"""Every move of a run, as JSON: with the base model it is all that the moved weights are made of.

    {"schema_version": 2, "epsilon": 0.001, "steps": 120,
     "parameters": {"model.layers.0.mlp.up_proj.weight": {"shape": [64, 32], "dtype": "bfloat16"}, …},
     "moves": [[step, seed, slope, rate], …]}

Numbers are written so that they are read back to the last bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import complete_file
from hybrid_lora_plugin.training.zeroth_order.weights import HELD, Move, PerturbedWeights

#: of a checkpoint's ``hybrid_lora`` folder
MOVES = "zeroth_order.json"
SCHEMA_VERSION = 2
_WAY_OUT = "give an unchanged file written by the run"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in HELD}


@dataclass
class MoveLog:
    """The moves of a run.

    Attributes:
        epsilon: ε, for people: a replay measures nothing.
        shapes, dtypes: of the whole parameters that move, as the model of the run held them, by plain name.
        moves: in their order.
        steps: that were taken, also those in which nothing moved: the number of the next one.
    """

    epsilon: float
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    moves: list[Move] = field(default_factory=list)
    steps: int = 0

    @classmethod
    def of(cls, weights: PerturbedWeights) -> MoveLog:
        """The empty log of weights that have not moved yet."""
        return cls(weights.epsilon, dict(weights.shapes), dict(weights.dtypes))

    def add(self, moves: Sequence[Move]) -> None:
        """Note the moves of the next step; there may be none."""
        self.moves.extend(moves)
        self.steps += 1

    def save(self, file: str | Path) -> None:
        """Write the log; an older file of that name is replaced whole."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "epsilon": self.epsilon,
            "steps": self.steps,
            "parameters": {
                name: {"shape": list(shape), "dtype": str(self.dtypes[name]).removeprefix("torch.")}
                for name, shape in self.shapes.items()
            },
            "moves": [[move.step, move.seed, move.slope, move.rate] for move in self.moves],
        }
        with complete_file(Path(file)) as unfinished:
            unfinished.write_text(json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> MoveLog:
        """Read a log.

        Raises:
            ConfigurationError: the file cannot be read, or is no such log.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            return _built(content)
        except OSError as error:
            raise ConfigurationError(f"zeroth order: {file} cannot be read ({error.strerror}); {_WAY_OUT}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigurationError(f"zeroth order: {file} is no log of moves ({error}); {_WAY_OUT}") from error

    def replay(self, weights: PerturbedWeights) -> None:
        """Make all moves again, on weights that have not moved: the base model's.

        The masters are then those of the run bit for bit, on any number of ranks, and the model holds them.

        Raises:
            ConfigurationError: these are not the parameters that the log is of, or are held in a type that cannot hold
                the values of the run's; nothing has moved.
        """
        if weights.shapes != self.shapes:
            wrong = sorted(
                name for name in {*weights.shapes, *self.shapes} if weights.shapes.get(name) != self.shapes.get(name)
            )[0]
            found, wanted = weights.shapes.get(wrong, "absent"), self.shapes.get(wrong, "absent")
            raise ConfigurationError(
                f"zeroth order: {wrong} is {found} in this model and {wanted} in the log; give the model and the "
                "modules of the run"
            )
        for name, dtype in weights.dtypes.items():
            if torch.promote_types(dtype, self.dtypes[name]) != dtype:
                raise ConfigurationError(
                    f"zeroth order: {name} is held in {dtype} here and was in {self.dtypes[name]} in the run, so its "
                    "values were rounded; load the model in the type of the run".replace("torch.", "")
                )
        weights.move(self.moves)
        weights.restore()

    def moved(self, name: str, base: Tensor) -> Tensor:
        """A weight as the model of the run held it after all moves; itself where it is none of those that move.

        Args:
            name: plain name.
            base: the base model's, whole, in the type that the run held it in; stays as it is.

        Raises:
            ConfigurationError: as ``replay``.
        """
        if name not in self.shapes:
            return base
        alone = MoveLog(self.epsilon, {name: self.shapes[name]}, {name: self.dtypes[name]}, self.moves)
        return replayed(alone, {name: base})[name].to(self.dtypes[name])


def replayed(log: MoveLog, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The moved weights of base weights, whole, in the masters' type; ``parameters`` stay as they are.

    Args:
        log: of the run.
        parameters: plain name -> base weight, on any device.

    Raises:
        ConfigurationError: as ``MoveLog.replay``.
    """
    weights = PerturbedWeights(((name, value.detach().clone()) for name, value in parameters.items()), log.epsilon)
    log.replay(weights)
    return {name: master.view(log.shapes[name]) for name, master in weights.masters.items()}


def _built(content: Any) -> MoveLog:
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {content['schema_version']!r}, wanted {SCHEMA_VERSION}")
    shapes, dtypes = {}, {}
    for name, one in content["parameters"].items():
        shapes[name] = tuple(_whole(size) for size in one["shape"])
        dtypes[name] = _DTYPES[one["dtype"]]
    moves = [
        Move(_whole(step), _whole(seed), _number(slope), _number(rate)) for step, seed, slope, rate in content["moves"]
    ]
    return MoveLog(_number(content["epsilon"]), shapes, dtypes, moves, _whole(content["steps"]))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r}, wanted a whole number of 0 or more")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r}, wanted a number")
    return float(value)
