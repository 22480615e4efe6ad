"""Commands in README and docs are true: targets exist, options are known, verl commands compose."""

from __future__ import annotations

import re
import shlex

import pytest

from hybrid_lora_plugin.cli.arguments import parse
from hybrid_lora_plugin.config import (
    AllocateCommandConfig,
    CompareCommandConfig,
    ExportCommandConfig,
    ProbeCommandConfig,
)
from tests.support.verl_processes import ROOT

PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    "hybrid-lora-probe": ProbeCommandConfig,
    "hybrid-lora-allocate": AllocateCommandConfig,
    "hybrid-lora-compare": CompareCommandConfig,
    "hybrid-lora-export": ExportCommandConfig,
}
# Under torchrun a command is the module that its entry point names.
MODULES = {"hybrid_lora_plugin.cli.probe": ProbeCommandConfig}


def code_of(page):
    """Commands of fenced blocks and of inline code, continuation lines joined."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    inline = re.findall(r"`([^`\n]+)`", text)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()] + inline


ALL = [(page, line) for page in PAGES for line in code_of(page)]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {shlex.split(line)[1] for _, line in ALL if line.startswith("make ")}
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in named)


@pytest.mark.parametrize("line", sorted({line for _, line in ALL if line.split()[0] in COMMANDS and "=" in line}))
def test_plugin_commands_use_known_options(line):
    program, *arguments = shlex.split(line)
    parse(arguments, COMMANDS[program])


@pytest.mark.parametrize("line", sorted({line for _, line in ALL if line.startswith("torchrun ")}))
def test_torchrun_commands_use_known_options(line):
    words = shlex.split(line)
    at = words.index("-m")
    parse(words[at + 2 :], MODULES[words[at + 1]])


@pytest.mark.parametrize("line", sorted({line for _, line in ALL if "main_ppo" in line and "=" in line}))
def test_verl_commands_compose(line):
    pytest.importorskip("verl", reason="verl is not installed")
    from hydra import compose, initialize_config_module

    arguments = [word for word in shlex.split(line)[3:] if word != "..."]
    search = []
    if "--config-dir" in arguments:
        at = arguments.index("--config-dir")
        search, arguments = (
            [f"hydra.searchpath=[file://{ROOT / arguments[at + 1]}]"],
            arguments[:at] + arguments[at + 2 :],
        )
    with initialize_config_module("verl.trainer.config", version_base=None):
        assert compose("ppo_trainer", overrides=search + arguments).hybrid_lora.enabled


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
