"""What each fault has cost, told on the terminal and kept for the table in docs/reliability.md.

PRICES=runs/prices.jsonl python -m pytest -m chaos && python -m tests.chaos.prices runs/prices.jsonl
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import pytest

from collab.files import write_text

DOC = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- prices -->\n", "<!-- end of prices -->\n"
IN_FULL = os.environ.get("CHAOS") == "full"
"""Whether faults last as long as the promise says (`make chaos`) or just long enough to be noticed (CI)."""


class Price(Protocol):
    def __call__(self, fault: str, moment: str = "", **cost: float) -> None:
        """Tell what a fault has cost.

        :param cost: such as seconds, samples, bytes: what was lost, not what was there.
        """


@pytest.fixture
def price(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Price:
    """To be called once in each test; `PRICES` names the file that the table is made of."""

    def tell(fault: str, moment: str = "", **cost: float) -> None:
        with capsys.disabled():
            print(f"\n{fault}, {moment}: {in_words(cost)}" if moment else f"\n{fault}: {in_words(cost)}")
        if file := os.environ.get("PRICES"):
            record = {"fault": fault, "moment": moment, "cost": cost, "test": request.node.nodeid}
            with Path(file).open("a", encoding="utf-8") as prices:
                prices.write(json.dumps(record) + "\n")

    return tell


def in_words(cost: dict[str, float]) -> str:
    """`{"seconds": 2.7, "failed_rounds": 5, "seconds_to_return": 1.7}` is "2.7 s, 5 failed rounds, 1.7 s to return"."""
    told = []
    for name, value in cost.items():
        what = name.replace("_", " ").replace("seconds", "s", 1)
        told.append(f"{value:,.0f} {what}" if value >= 100 else f"{value:.2g} {what}")
    return ", ".join(told)


def table(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line for each fault that was tried, in the order of the tests."""
    lines = ["| fault | what it cost the others | test |", "| --- | --- | --- |"]
    for record in records:
        fault = ", ".join(filter(None, (record["fault"], record["moment"])))
        test = Path(record["test"].partition("::")[0]).name
        lines.append(f"| {fault} | {in_words(record['cost'])} | [{test}](../tests/chaos/{test}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    records = map(json.loads, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    before, _, rest = DOC.read_text(encoding="utf-8").partition(BEGIN)
    write_text(DOC, f"{before}{BEGIN}\n{table(records)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
