"""The table that every benchmark prints, and the rows that it writes for machines."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from collab.files import write_text


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    bar: float | None
    """What it has to reach; None where nothing was set."""
    ok: bool


class Report:
    """Collects figures; `finish` shows them."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def at_least(self, name: str, value: float, unit: str, bar: float) -> None:
        """A figure that should not be below `bar`."""
        self.rows.append(Row(name, value, unit, bar, value >= bar))

    def at_most(self, name: str, value: float, unit: str, bar: float) -> None:
        """A figure that should not be above `bar`."""
        self.rows.append(Row(name, value, unit, bar, value <= bar))

    def figure(self, name: str, value: float, unit: str) -> None:
        """A figure without a bar."""
        self.rows.append(Row(name, value, unit, None, True))

    def table(self) -> str:
        """The figures in columns, missed bars marked."""
        cells = [("", "value", "unit", "bar", "")]
        cells += [
            (r.name, f"{r.value:,.4g}", r.unit, "" if r.bar is None else f"{r.bar:,.4g}", "" if r.ok else "MISSED")
            for r in self.rows
        ]
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        lines = [
            f"{n:<{widths[0]}}  {v:>{widths[1]}} {u:<{widths[2]}}  {b:>{widths[3]}}  {m}" for n, v, u, b, m in cells
        ]
        return "\n".join(line.rstrip() for line in lines)

    def finish(self, json_path: Path | None = None) -> int:
        """Print the table, write the rows, and return the exit status: 1 if a bar was missed."""
        print(self.table(), flush=True)
        if json_path is not None:
            write_text(json_path, json.dumps([asdict(row) for row in self.rows], indent=2) + "\n")
        return 0 if all(row.ok for row in self.rows) else 1


def run_benchmark(description: str, measure: Callable[..., None], **numbers: int) -> NoReturn:
    """The whole command line of a benchmark module.

    :param numbers: what can be set, with its default: `rounds=50` is an option `--rounds` and `measure` gets `rounds`.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = parser.parse_args()
    report = Report()
    measure(report, **{name: getattr(options, name) for name in numbers})
    sys.exit(report.finish(options.json))
