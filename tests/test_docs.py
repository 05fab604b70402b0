"""What the docs tell people to type works: every command in them is checked against the programs themselves."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from arguments import AGREED, AuxArguments, HostArguments, PeerArguments, TrainerArguments, parse, pick
from run_expert_server import ServerArguments
from scripts.inspect_data import InspectArguments
from scripts.status import StatusArguments

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "run_trainer.py": (*AGREED, PeerArguments, TrainerArguments, HostArguments),
    "run_expert_server.py": (PeerArguments, HostArguments, ServerArguments),
    "scripts/inspect_data.py": (*AGREED, InspectArguments),
    "scripts/status.py": (PeerArguments, StatusArguments),
    "scripts/doctor.py": (*AGREED, PeerArguments, TrainerArguments),
    "run_aux_peer.py": (*AGREED, PeerArguments, AuxArguments),
}


def commands() -> list[tuple[str, str]]:
    """(file, command) for every line of a bash block, every inline `python ...`, and the headers of configs."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            found += [(page.name, line) for line in block.splitlines() if line.strip()]
        text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
        found += [(page.name, code) for code in re.findall(r"`((?:python|make) [^`]+)`", text.replace("\n", " "))]
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        found += [
            (config.name, code) for code in re.findall(r"^#.*?(python run_.*)$", config.read_text(), re.MULTILINE)
        ]
    return found


@functools.cache
def help_of(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_docs_hold_commands() -> None:
    assert len(commands()) > 12


@pytest.mark.parametrize("page, command", commands())
def test_a_command_of_the_docs_is_understood(page: str, command: str) -> None:
    words = [word for word in shlex.split(command) if word != "..."]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{page}: the Makefile has no such target"
    elif words[0] == "python" and words[1] in PROGRAMS:
        classes = PROGRAMS[words[1]]
        arguments = [] if words[2:] == ["--help"] else words[2:]
        if arguments[-1:] == ["--initial_peers"]:  # "paste the line here" in a config's header
            arguments.append("/ip4/203.0.113.7/tcp/31337/p2p/QmRunOrganizer")
        given = parse("", classes, arguments)
        for cls in classes:
            pick(cls, {"run_id": "example"} | given)
    elif words[:2] == ["python", "-m"] or words[1].startswith("scripts/"):
        module, *rest = words[2:] if words[1] == "-m" else (words[1].removesuffix(".py").replace("/", "."), *words[2:])
        understood = help_of(module)
        for flag in (word for word in rest if word.startswith("--")):
            assert flag in understood, f"{page}: {module} has no {flag}"
    else:
        assert words[:3] == ["hf", "auth", "login"], f"{page}: nothing here knows how to check {command!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
