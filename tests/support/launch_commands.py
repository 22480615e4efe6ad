"""Launch commands of verl, as people write them, and what the check before Ray says of each with the plugin added.

The commands are data, ``tests/data/launch_commands/*.yaml``, a file for each kind, with the verdict that is expected
of each. ``python -m tests.support.launch_commands docs/compatibility.md`` judges them all and writes the page.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import huggingface_hub.constants
import torch
import yaml
from omegaconf import DictConfig
from safetensors.torch import save_file
from transformers import AutoConfig

from hybrid_lora_plugin.candidates import meta_model
from hybrid_lora_plugin.errors import ConfigurationError
from tests.support.allocations import decide_for, draw_measurements
from tests.support.hydra_bases import HydraBases

DATA = Path(__file__).parent.parent / "data" / "launch_commands"
#: entry point of verl, and the file in the folder ``config`` beside it from which it starts
ENTRY_POINTS = {
    "verl.trainer.main_ppo": "ppo_trainer",
    "verl.trainer.sft_trainer": "sft_trainer_engine",
    "verl.trainer.sft_trainer_ray": "sft_trainer_engine",
    "verl.experimental.one_step_off_policy.main_ppo": "one_step_off_ppo_trainer",
    "verl.experimental.fully_async_policy.fully_async_main": "fully_async_ppo_trainer",
}
#: what the plugin settles: name in the data, and in a configuration
SETTLED = {
    "strategy": "actor_rollout_ref.actor.strategy",
    "full_lr": "hybrid_lora.full_lr",
    "lora_lr": "hybrid_lora.lora.lr",
    "rank": "actor_rollout_ref.model.lora_rank",
    "alpha": "actor_rollout_ref.model.lora_alpha",
}
#: what is settled where the data do not say otherwise
DEFAULTS = {"strategy": "fsdp2", "rank": 16, "alpha": 32}
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@dataclass(frozen=True)
class LaunchCommand:
    """One command, and the verdict that is expected of it."""

    name: str
    title: str
    #: as typed into a shell, without the plugin's two arguments; ``$PWD`` is where it is typed
    command: str
    #: YAML files that it reads, by their paths from there
    files: dict[str, str] = field(default_factory=dict)
    #: the same, copied from the configuration files of verl
    copies: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    #: values settled by name of ``SETTLED``; ``said``: parts of what is printed; ``untouched``: values by full name
    accepted: dict[str, Any] | None = None
    #: ``see``: entry of the troubleshooting page; ``words``: parts of the line that ends the run
    refused: dict[str, Any] | None = None

    def __post_init__(self):
        assert (self.accepted is None) != (self.refused is None), f"{self.name}: accepted or refused"

    @property
    def entry_point(self) -> str:
        return self._module_and_arguments[0]

    @property
    def arguments(self) -> list[str]:
        return self._module_and_arguments[1]

    @property
    def _module_and_arguments(self) -> tuple[str, list[str]]:
        words = shlex.split(self.command)
        at = words.index("-m")
        return words[at + 1], words[at + 2 :]


class Kind(NamedTuple):
    """Commands of one kind, a section of the page."""

    title: str
    about: str
    commands: list[LaunchCommand]


class Verdict(NamedTuple):
    """What the check before Ray says of a command with the plugin's two arguments added."""

    #: the line that ends the run; "" for a command that is accepted
    line: str
    #: lines that an accepted command prints
    said: list[str]
    #: the configuration as the check leaves it
    config: DictConfig

    @property
    def accepted(self) -> bool:
        return not self.line


def read_kinds() -> list[Kind]:
    """All commands, in the order of the page."""
    kinds = []
    for file in sorted(DATA.glob("[0-9]*.yaml")):
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
        # Before the command's own, which win.
        commands = [
            LaunchCommand(**entry | {"command": _with_common(entry["command"], read.get("common", ""))})
            for entry in read["commands"]
        ]
        kinds.append(Kind(read["kind"], read["about"], commands))
    return kinds


def _with_common(command: str, common: str) -> str:
    head, module, arguments = re.fullmatch(r"(.*?-m )(\S+)(.*)", command.strip(), re.S).groups()
    return f"{head}{module} {common.strip()}{arguments}"


@cache
def _weights(family: str, config: str) -> dict[str, torch.Tensor]:
    """Weights, all zero, of a model; one of no meaning for a model that is refused before they are looked at."""
    try:
        model = meta_model(AutoConfig.for_model(**json.loads(config)))
    except ConfigurationError:
        return {"weight": torch.zeros(1)}
    return {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}


class Workplace:
    """A folder to launch from, in which the models of ``models.yaml`` lie under their hub names, with weights of zero.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.bases = HydraBases()
        models = yaml.safe_load((DATA / "models.yaml").read_text(encoding="utf-8"))
        self._family = models["models"]
        for name, family in self._family.items():
            (self.folder / name).mkdir(parents=True)
            content = SIZES | models["families"][family]
            (self.folder / name / "config.json").write_text(json.dumps(content))
            save_file(_weights(family, json.dumps(content)), self.folder / name / "model.safetensors")

    def judge(self, command: LaunchCommand) -> Verdict:
        """The verdict on ``command``, as the run's user gets it."""
        from hybrid_lora_plugin.verl_backend.preflight import Preflight, RunRefused

        printed = io.StringIO()
        environment = {"PWD": str(self.folder)} | command.environment
        offline = mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        self._write_files(command)
        with mock.patch.dict(os.environ, environment), offline, _working_in(self.folder):
            config = self._composed(command)
            try:
                with redirect_stdout(printed), self.bases.files_looked_up_once():
                    Preflight().on_run_start(config)
                line = ""
            except RunRefused as end:
                line = end.line
        said = [line.removeprefix("hybrid_lora: ") for line in printed.getvalue().splitlines()]
        return Verdict(line, said, config)

    def _write_files(self, command: LaunchCommand) -> None:
        import verl

        verls = Path(verl.__file__).parent / "trainer" / "config"
        copied = {name: (verls / of).read_text(encoding="utf-8") for name, of in command.copies.items()}
        for name, text in (command.files | copied).items():
            file = self.folder / name
            assert not file.exists() or file.read_text() == text, f"{command.name}: another command has {name} too"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def _composed(self, command: LaunchCommand) -> DictConfig:
        config = self.bases.compose(*self.start_and_overrides(command))
        # As ``hydra.main`` calls a job.
        config.hydra.job.name = command.entry_point.rpartition(".")[2]
        return config

    def start_and_overrides(self, command: LaunchCommand) -> tuple[str, str, list[str]]:
        """Where the command's files are, which one is the first, and its overrides, the plugin's two among them."""
        place, name, overrides = _config_folder(command.entry_point), ENTRY_POINTS[command.entry_point], []
        for argument in map(os.path.expandvars, command.arguments):
            if argument.startswith("--config-path="):
                given = argument.partition("=")[2]
                # Relative ones are verl's own, beside the entry point.
                place = given if os.path.isabs(given) else place
            elif argument.startswith("--config-name="):
                name = argument.partition("=")[2]
            else:
                overrides.append(argument)
        overrides += ["+hybrid_lora=enabled", f"hybrid_lora.allocation={self._allocation(command)}"]
        return place, name, overrides

    def _allocation(self, command: LaunchCommand) -> Path:
        """An allocation of the model that the command names; of another one where nobody could make one."""
        text = " ".join([*command.arguments, *command.files.values()])
        named = [name for name in self._family if re.search(rf"(?<!critic\.model\.)path\W+{re.escape(name)}\b", text)]
        family = self._family[named[0]] if named else "qwen2"
        return self._allocation_of(family) or self._allocation_of("qwen2")

    @cache  # noqa: B019  one workplace for a session
    def _allocation_of(self, family: str) -> Path | None:
        from transformers import AutoConfig

        from hybrid_lora_plugin.allocation.storage import write_allocation
        from hybrid_lora_plugin.candidates import find_candidates_from_config

        model = next(name for name, of in self._family.items() if of == family)
        config = AutoConfig.from_pretrained(self.folder / model)
        try:
            measured = draw_measurements(len(find_candidates_from_config(config)))
        except ValueError:
            return None
        folder = self.folder / "allocations" / family
        folder.mkdir(parents=True)
        # Without its pictures, which take longer than everything else here.
        write_allocation(folder, decide_for(config, measured), measured)
        return folder


def _config_folder(entry_point: str) -> str:
    """The package of an entry point's configuration files, as Hydra takes it; their folder where it is no package."""
    import verl

    package = f"{entry_point.rpartition('.')[0]}.config"
    folder = Path(verl.__file__).parent.parent.joinpath(*package.split("."))
    return package if (folder / "__init__.py").exists() else str(folder)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def settled(config: DictConfig) -> dict[str, Any]:
    """What the plugin has settled in ``config``, by the names of ``SETTLED``."""
    from hybrid_lora_plugin.verl_backend.run_kinds import kind_of_run

    kind = kind_of_run(config)
    return {name: kind.select(config, full) for name, full in SETTLED.items()}


def main(page: str) -> None:
    import tempfile

    from recipes.demo.environment import CPU_ENVIRONMENT

    # Before anything imports verl, which reads its platform once.
    os.environ.update(CPU_ENVIRONMENT)
    from tests.support.compatibility_page import compatibility_page

    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder))
        kinds = read_kinds()
        verdicts = {command.name: workplace.judge(command) for kind in kinds for command in kind.commands}
    Path(page).write_text(compatibility_page(kinds, verdicts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
