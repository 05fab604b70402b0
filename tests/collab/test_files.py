"""Files: a good one is never replaced by half of a new one."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from collab.errors import UserError
from collab.files import remove_partial_files, replacing_folder, write_bytes, write_text


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "new" / "file", "পুরনো")
    write_text(tmp_path / "new" / "file", "নতুন")
    assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "নতুন"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("first", "second"):
        with replacing_folder(tmp_path / "folder") as scratch:
            (scratch / name).write_text(name)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_a_block_that_fails_changes_nothing(tmp_path):
    with replacing_folder(tmp_path / "folder") as scratch:
        (scratch / "good").write_text("good")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "folder") as scratch:
        (scratch / "bad").write_text("bad")
        1 / 0  # noqa: B018
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["good"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_leaves_the_good_file(tmp_path):
    """The limit on the size of a file makes the system refuse a write in the middle, as a full disk does."""
    write_bytes(tmp_path / "file", b"good")
    program = f"""
        import resource, signal
        from pathlib import Path
        from collab.errors import UserError
        from collab.files import write_bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_bytes(Path({str(tmp_path)!r}) / "file", b"x" * 5000)
        except UserError as error:
            print(error)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, capture_output=True, text=True)
    assert "Cannot write" in done.stdout and "Free some space" in done.stdout, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"good"}


def test_a_place_that_is_no_folder_is_told_to_the_person(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(UserError, match="Cannot write"), replacing_folder(tmp_path / "file" / "below"):
        pass


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / ".status.json.123.partial"
    for path in (left, tmp_path / "status.json", tmp_path / ".hidden"):
        path.touch()
    (tmp_path / ".step-1.x.partial").mkdir()
    remove_partial_files(tmp_path)
    remove_partial_files(tmp_path / "not there")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".step-1.x.partial", "status.json"]
