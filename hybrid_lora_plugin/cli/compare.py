"""``hybrid-lora-compare``: how far two or more allocations of one model agree."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_lora_plugin.cli.arguments import expand_home, parse, print_help, report_error, require_given, wants_help
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.config import CompareCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import complete_folder

PROGRAM = "hybrid-lora-compare"
SUMMARY = (
    "Shows which modules two or more allocations of one model both fully fine-tune, how much of that chance would "
    "give, and how far their orders of preference agree."
)
EXAMPLE = f"{PROGRAM} 'allocations=[runs/hybrid,runs/random]' output_dir=comparison"


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments; returns 0, or 2 on a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, CompareCommandConfig)
    try:
        config = expand_home(parse(argv, CompareCommandConfig))
        require_given(config, {"allocations": "[runs/hybrid,runs/random]"})
        # Late, so that --help and a mistyped option answer at once.
        from hybrid_lora_plugin.allocation.storage import load_allocation, refuse_existing
        from hybrid_lora_plugin.report.compare import compare, make_labels
        from hybrid_lora_plugin.report.compare_tables import as_text, comparison_tables
        from hybrid_lora_plugin.report.compare_verdict import verdicts

        if config.output_dir:
            refuse_existing(config.output_dir)
        allocations = [load_allocation(path, "allocations") for path in config.allocations]
        comparison = compare(allocations, make_labels(allocations, config.allocations))
        tables = comparison_tables(comparison, config.allocations)
        print("\n".join(verdicts(comparison)) + "\n\n" + as_text(tables))
        if config.output_dir:
            with writing():
                write_comparison(comparison, tables, config.output_dir)
            print(f"\ncompare.md and compare.png written to {config.output_dir}")
    except ConfigurationError as error:
        return report_error(PROGRAM, error)
    return 0


def write_comparison(comparison, tables, folder: str | Path) -> None:
    """Write ``compare.md`` and ``compare.png``, both or nothing.

    Args:
        comparison: from ``compare``.
        tables: from ``comparison_tables``.
        folder: where to; it must not exist, or be an empty folder.

    Raises:
        ConfigurationError: the folder cannot be written.
    """
    from hybrid_lora_plugin.report.compare_plot import draw_comparison
    from hybrid_lora_plugin.report.compare_tables import as_markdown
    from hybrid_lora_plugin.report.compare_verdict import verdicts

    model = comparison.allocations[0].model.name_or_path
    title = f"# {len(comparison.allocations)} allocations for {model} compared"
    picture = "![What each allocation fully fine-tunes, and how much of it pairs share](compare.png)"
    try:
        with complete_folder(Path(folder)) as unfinished:
            said = "\n".join(f"- {sentence}" for sentence in verdicts(comparison))
            text = f"{title}\n\n{said}\n\n{picture}\n\n{as_markdown(tables)}\n"
            (unfinished / "compare.md").write_text(text, encoding="utf-8")
            draw_comparison(comparison, unfinished / "compare.png")
    except OSError as error:
        raise ConfigurationError(f"output_dir: {folder} cannot be written ({error}); give another folder") from error


if __name__ == "__main__":
    sys.exit(main())
