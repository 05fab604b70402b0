"""The conventions of benchmarks: a table for people, rows for machines, an exit status for CI."""

import json
from pathlib import Path

import pytest

from benchmarks import report as module
from benchmarks.report import Report


def test_a_missed_bar_is_marked_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.at_least("speed", 4.0, "x", bar=5.0)
    report.at_most("bytes", 10.0, "MB", bar=20.0)
    report.figure("samples", 1234567.0, "")
    assert report.finish(tmp_path / "rows.json") == 1
    speed, size, samples = capsys.readouterr().out.splitlines()[1:]
    assert "speed" in speed and speed.endswith("MISSED")
    assert "MISSED" not in size + samples
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0] == {"name": "speed", "value": 4.0, "unit": "x", "bar": 5.0, "ok": False}
    assert rows[1]["ok"] is True
    assert rows[2]["bar"] is None and rows[2]["ok"] is True


@pytest.mark.parametrize("value, status", [(5.0, 0), (4.9, 1)])
def test_the_command_line_exits_with_the_verdict(
    value: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit) as ended:
        module.run_benchmark("a benchmark", lambda report: report.at_least("speed", value, "x", bar=5.0))
    assert ended.value.code == status
    assert (tmp_path / "rows.json").exists()
