"""What one record of the table of contracts says, and the features that records are of."""

from __future__ import annotations

from dataclasses import dataclass

#: version in which the symbols of each distribution were read
READ_IN = {
    "verl": "verl 0.9.1",
    "vllm": "vLLM 0.28.0",
    "peft": "PEFT 0.21.2",
    "torch": "torch 2.13.0",
    "transformers": "transformers 5.10.4",
    "ray": "Ray 2.60.0",
    "hydra": "Hydra 1.3",
    "omegaconf": "OmegaConf 2.3",
}

#: newer ones that runs, syncs and model families were tried with, of those in requirements/cpu-next.txt
RAN_WITH = {"vllm": "0.29.0", "transformers": "5.12.1"}

#: what a user can do with the plugin, and cannot where a symbol of that feature is missing
FEATURES = {
    "registration": "verl finds the plugin: its entry point, engine, rollout side and checks on the driver",
    "engine": "the engine trains full and LoRA modules, with the base model as its reference policy",
    "server": "the rollout server generates from proven weights only",
    "merge": "hybrid_lora.sync=merge",
    "sparse_merge": "hybrid_lora.sync=sparse_merge",
    "adapter": "hybrid_lora.sync=adapter",
    "receiver_merge": "hybrid_lora.sync=receiver_merge",
    "logprobs": "hybrid_lora.sync_check=logprobs",
    "loss": "loss hybrid_gspo and advantage hybrid_group",
    "checkpoint": "checkpoints of a run, and resuming from one",
    "export": "hybrid-lora-export",
    "probe": "the probe on rows: hybrid-lora-probe, and hybrid_lora.probe.objective=sft",
    "policy_probe": "the probe on rollouts: hybrid_lora.probe.objective=policy",
    "evaluation": "responses for hybrid-lora-eval",
    "plan": "hybrid-lora-plan",
    "evidence": "hybrid-lora-evidence",
    "cpu": "runs without an accelerator: VERL_PLATFORM=cpu",
}
#: the sync modes, for symbols that every one of them needs
SYNC = "merge sparse_merge adapter receiver_merge"
#: features that every run needs; of the sync modes it needs its own
EVERY_RUN = ("registration", "engine", "server")


@dataclass(frozen=True)
class Contract:
    """One symbol of another library.

    Attributes:
        features: keys of ``FEATURES`` that do not work without it.
        module: module it is looked up in.
        name: qualified name in there, ``Class.attribute`` or ``function``; empty for the module itself.
        files: files that rely on it, relative to the package ``hybrid_lora_plugin``.
        reason: what for.
        arguments: parameters it is called with, or called with by the library, in the order of its signature.
        also: other qualified names in the same module, of which one is enough.
        constant: a text that stands as a literal in the module, which has no name that could be looked up.
        since: version of the module's distribution before which nothing relies on it; empty for every version.
    """

    features: tuple[str, ...]
    module: str
    name: str
    files: tuple[str, ...]
    reason: str
    arguments: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    constant: str = ""
    since: str = ""

    @property
    def symbol(self) -> str:
        """Full dotted name; of a literal, its module's with the literal behind it."""
        named = f"{self.module}.{self.name}" if self.name else self.module
        return f'{named} "{self.constant}"' if self.constant else named

    @property
    def last_name(self) -> str:
        """What the plugin's own source calls it."""
        return self.constant or (self.name or self.module).rpartition(".")[2]

    @property
    def kind(self) -> str:
        """``private`` if a part of the name begins with one underscore, else ``public``."""
        parts = f"{self.module}.{self.name}".split(".")
        return "private" if any(part.startswith("_") and not part.startswith("__") for part in parts) else "public"

    @property
    def library(self) -> str:
        """The library's top module."""
        return self.module.partition(".")[0]

    @property
    def read_in(self) -> str:
        """Library and version that the record was made from."""
        return READ_IN[self.library]


@dataclass(frozen=True)
class Behaviour:
    """Something a library does, which its names do not show.

    Attributes:
        features: as in ``Contract``.
        file: file that relies on it, relative to the package.
        holds: what must hold.
        test: ``tests/FILE.py::FUNCTION`` that fails when it does not; None where there is none.
    """

    features: tuple[str, ...]
    file: str
    holds: str
    test: str | None


@dataclass(frozen=True)
class Subject:
    """The records of one file of this package.

    Attributes:
        title: heading of its part of ``docs/contracts.md``.
        contracts: symbols.
        behaviours: what no symbol shows.
    """

    title: str
    contracts: tuple[Contract, ...]
    behaviours: tuple[Behaviour, ...]


def rows(features: str, module: str, owner: str, *of: tuple) -> list[Contract]:
    """Records of one owner; a row is names, file or files, reason, arguments, with spaces between names.

    Args:
        features: keys of ``FEATURES``, with spaces between them.
        module, owner: the names of a row are looked up in ``owner`` of ``module``, in the module itself without one.
        of: the rows.
    """
    made = []
    for names, files, reason, *arguments in of:
        files = (files,) if isinstance(files, str) else files
        for name in names.split() or [""]:
            qualified = ".".join(part for part in (owner, name) if part)
            given = tuple(" ".join(arguments).split())
            made.append(Contract(tuple(features.split()), module, qualified, files, reason, given))
    return made


def behaviour(features: str, file: str, holds: str, test: str | None) -> Behaviour:
    """A ``Behaviour`` whose features are written with spaces between them."""
    return Behaviour(tuple(features.split()), file, holds, test)
