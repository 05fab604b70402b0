"""Whether this computer is fit: what is too small, too old or missing is named, with what to do about it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from collab import machine
from collab.errors import UserError
from collab.machine import GB

ROOT = Path(__file__).resolve().parents[2]


def test_the_pinned_packages_are_installed_here() -> None:
    assert machine.check_packages(ROOT / "requirements.txt").verdict == "ok"


def test_other_and_missing_packages_are_named(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("# ours\ntorch==0.1.0  # old\nno-such-package==1.0\nhivemind==1.1.12\n")
    finding = machine.check_packages(tmp_path / "requirements.txt")
    assert finding.verdict == "failed" and "make setup" in finding.advice
    assert "but 0.1.0 is pinned" in finding.message and "no-such-package: not installed" in finding.message
    assert "hivemind" not in finding.message


def test_the_device_is_named_with_its_precision() -> None:
    assert "computing in the faster of float32 and bfloat16" in machine.check_device("cpu", "auto").message
    assert "computing in float32" in machine.check_device("cpu", "float32").message
    with pytest.raises(UserError, match="cuda:99"):
        machine.check_device("cuda:99", "auto")


def test_too_little_memory_for_the_model() -> None:
    assert machine.check_memory(10**6).verdict in ("ok", "warning")
    finding = machine.check_memory(10**12)
    assert finding.verdict == "failed" and "GB" in finding.message and finding.advice


def shrink(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free, 0, free))


def test_the_shared_memory_of_a_container_is_too_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, 64 * 2**20)  # Docker's
    finding = machine.check_shared_memory(folder=tmp_path)
    assert finding.verdict == "warning" and "--shm-size" in finding.advice
    assert machine.check_shared_memory(20 * 10**6, folder=tmp_path).verdict == "failed"
    shrink(monkeypatch, 2 * GB)
    assert machine.check_shared_memory(20 * 10**6, folder=tmp_path).verdict == "ok"
    assert machine.check_shared_memory(folder=tmp_path / "nothing").verdict == "ok"


@pytest.mark.parametrize(("free", "verdict"), [(GB // 10, "failed"), (2 * GB, "warning"), (50 * GB, "ok")])
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, verdict: str) -> None:
    shrink(monkeypatch, free)
    finding = machine.check_disk(tmp_path / "cache")
    assert finding.verdict == verdict and str(tmp_path / "cache") in finding.message
    assert ("--cache_dir" in finding.advice) == (verdict != "ok")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        machine.check_disk(tmp_path / "file" / "cache")


LIMITED = """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
    from collab.machine import check_open_files
    print(check_open_files())
"""


def test_a_low_limit_on_open_files() -> None:
    """In a process of its own: a hard limit does not come back."""
    code = "\n".join(line.strip() for line in LIMITED.splitlines())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "'warning'" in done.stdout and "1024 files" in done.stdout and "ulimit -n 4096" in done.stdout


def test_the_codecs_are_healthy_here() -> None:
    assert machine.check_codecs_here().verdict == "ok"
