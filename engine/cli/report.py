"""``cohobate report``: the report page of a run."""

from __future__ import annotations

from pathlib import Path

from cohobate.cli.parsing import Parser, parse


def main(arguments: list[str]) -> int:
    """Write the page of the run folder that is named."""
    parser = Parser(prog="cohobate report", description="Write report.html and its figures into a run folder.")
    parser.add_argument("run", type=Path, help="folder of a run")
    options = parse(parser, arguments)
    if options is None:
        return 0
    write(options.run)
    return 0


def write(run: Path) -> None:
    """Write the page of ``run`` and say where it is."""
    from cohobate.report import write_report

    print(f"report: {write_report(run)}")
