"""What each fault has cost, told on the terminal and kept for the table in docs/reliability.md."""

import json
import os
from pathlib import Path
from typing import Protocol

import pytest


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
            told = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in cost.items())
            print(f"\n{fault} {moment}: {told}")
        if file := os.environ.get("PRICES"):
            record = {"fault": fault, "moment": moment, "cost": cost, "test": request.node.nodeid}
            with Path(file).open("a", encoding="utf-8") as prices:
                prices.write(json.dumps(record) + "\n")

    return tell
