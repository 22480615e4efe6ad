"""Commands in README and docs are true: targets exist, options are known, verl commands compose, shells take them."""

from __future__ import annotations

import re
import shlex

import pytest

from hybrid_lora_plugin.cli import allocate, compare, data, doctor, eval, evidence, export, plan, probe, trial
from hybrid_lora_plugin.cli.arguments import parse
from hybrid_lora_plugin.config import (
    AllocateCommandConfig,
    CompareCommandConfig,
    DataCommandConfig,
    DoctorCommandConfig,
    EvaluateCommandConfig,
    ExportCommandConfig,
    ProbeCommandConfig,
)
from hybrid_lora_plugin.config_evidence import EvidenceCommandConfig
from hybrid_lora_plugin.config_plan import PlanCommandConfig
from hybrid_lora_plugin.config_trial import TrialRunsCommandConfig
from tests.support.verl_processes import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = {
    "hybrid-lora-probe": ProbeCommandConfig,
    "hybrid-lora-allocate": AllocateCommandConfig,
    "hybrid-lora-compare": CompareCommandConfig,
    "hybrid-lora-data": DataCommandConfig,
    "hybrid-lora-export": ExportCommandConfig,
    "hybrid-lora-doctor": DoctorCommandConfig,
    "hybrid-lora-eval": EvaluateCommandConfig,
    "hybrid-lora-plan": PlanCommandConfig,
    "hybrid-lora-evidence": EvidenceCommandConfig,
    "hybrid-lora-trial": TrialRunsCommandConfig,
}
# Under torchrun a command is the module that its entry point names.
MODULES = {"hybrid_lora_plugin.cli.probe": ProbeCommandConfig}
EXAMPLES = [module.EXAMPLE for module in (probe, allocate, compare, data, export, doctor, eval, plan, evidence, trial)]
SHELL_BLOCKS = ("bash", "sh", "zsh", "shell", "console")
#: what a shell reads as part of a pattern or of its own grammar
GLOB = "*?[]{}()^"


def fenced(page):
    """Lines of fenced blocks with the block's language, continuation lines joined."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [(language, line.strip()) for language, block in blocks for line in block.splitlines() if line.strip()]


def code_of(page):
    """Lines of fenced blocks in no language or a shell's, and inline code."""
    inline = re.findall(r"`([^`\n]+)`", page.read_text())
    return [line for language, line in fenced(page) if language in ("", *SHELL_BLOCKS)] + inline


def is_command(language, line):
    """Whether a fenced line is one to paste into a shell: by its block's language, or by its first word."""
    program = re.match(r"(?:[A-Z_]+=\S* )*(\S+)", line)[1].rpartition("/")[2]
    known = {*COMMANDS, "python", "torchrun", "pip", "uv", "make", "pytest", "ruff", "git", "cd", "export", "source"}
    return language in SHELL_BLOCKS or (not language and program in known)


def unquoted(line):
    """The line with every quoted character as ``_``, as POSIX shells quote: backslash, '...', "..."."""
    return re.sub(r"\\.|'[^']*'|\"(?:\\.|[^\"\\])*\"", lambda found: "_" * len(found[0]), line)


ALL = [(page, line) for page in PAGES for line in code_of(page)]
PASTED = sorted({line for page in PAGES for language, line in fenced(page) if is_command(language, line)})


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {shlex.split(line)[1] for _, line in ALL if line.startswith("make ")}
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in named)


@pytest.mark.parametrize("line", sorted({line for _, line in ALL if line.split()[0] in COMMANDS and "=" in line}))
def test_plugin_commands_use_known_options(line):
    program, *arguments = shlex.split(line)
    parse(plan.split(arguments)[0], COMMANDS[program])


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_commands_use_known_options(example):
    program, *arguments = shlex.split(example)
    parse(plan.split(arguments)[0], COMMANDS[program])


def test_every_page_with_commands_is_searched():
    assert len(EXAMPLES) == len(COMMANDS)
    assert {"make demo", "make test"} <= set(PASTED)


@pytest.mark.parametrize("line", [*PASTED, *EXAMPLES])
def test_a_command_can_be_pasted_into_bash_and_zsh(line):
    shlex.split(line)
    # zsh stops at a pattern that matches no file, and takes no comment where commands are typed.
    assert not set(unquoted(line)) & set(GLOB), f"unquoted pattern: {line}"
    assert not re.search(r"(^|\s)#", unquoted(line)), f"comment: {line}"


@pytest.mark.parametrize(
    "line, rest",
    [
        ("probe 'files=[a]' x", "probe ___________ x"),
        ("pip install '.[gpu]'  # comment", "pip install ________  # comment"),
        ('say "it\'s [a]" \\[b\\]', "say __________ __b__"),
    ],
)
def test_quoted_characters_are_told_from_others(line, rest):
    assert unquoted(line) == rest


@pytest.mark.parametrize(
    "line", sorted({line for _, line in ALL if line.startswith("torchrun ") and "hybrid_lora_plugin" in line})
)
def test_torchrun_commands_use_known_options(line):
    words = shlex.split(line)
    at = words.index("-m")
    parse(words[at + 2 :], MODULES[words[at + 1]])


#: verl's commands that a page may show, and the configuration of each
PRIMARY = {"verl.trainer.main_ppo": "ppo_trainer", "verl.trainer.sft_trainer": "sft_trainer_engine"}


@pytest.mark.parametrize(
    "line", sorted({line for _, line in ALL if "=" in line and any(f"-m {name} " in line for name in PRIMARY)})
)
def test_verl_commands_compose(line):
    pytest.importorskip("verl", reason="verl is not installed")
    from hydra import compose, initialize_config_module

    words = shlex.split(line)
    at = words.index("-m") + 1
    primary, arguments = PRIMARY[words[at]], [w for w in words[at + 1 :] if w not in ("...", "YOUR_ARGUMENTS")]
    search = []
    if "--config-dir" in arguments:
        at = arguments.index("--config-dir")
        search, arguments = (
            [f"hydra.searchpath=[file://{ROOT / arguments[at + 1]}]"],
            arguments[:at] + arguments[at + 2 :],
        )
    with initialize_config_module("verl.trainer.config", version_base=None):
        assert compose(primary, overrides=search + arguments).hybrid_lora.enabled


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
