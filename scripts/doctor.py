"""Find out why this computer cannot join a run, or whether it can.

    python scripts/doctor.py --initial_peers ADDRESS

It takes the options of run_trainer.py: put it in the place of that program. It dials each address on its own, joins for
a moment, looks at this computer, and says what to do next. Without addresses it looks at this computer only.
"""

import contextlib
import logging
import netrc
import os
import shlex
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    from arguments import AGREED, PeerArguments, TrainerArguments, parse, pick, refuse_contradictions
    from collab import machine
    from collab.bandwidth import Bandwidth, measure_bandwidth
    from collab.console import Console
    from collab.diagnosis import Finding, Verdict, clock_finding, diagnose_peers, identity_finding
    from collab.errors import UserError
    from collab.manifest import Manifest, fetch_manifest
    from collab.metrics import read_records, run_validators
    from collab.peer import Peer, peer_id_in
    from collab.processes import guard_children, run_program
    from collab.reachability import advice, check_reachability
    from tasks import find_task
except ImportError as error:
    sys.exit(
        f"error: {error}. The pinned packages are not all installed for {sys.executable} (Python "
        f"{sys.version.split()[0]}; 3.11 or newer is needed). Type `make setup`, then `source .venv/bin/activate`."
    )

SECONDS = 30.0  # for a check that says nothing else
COLOURS: dict[Verdict, str] = {"ok": "32", "warning": "33", "failed": "31", "unknown": "2"}  # of ANSI terminals
WIRE_BYTES = {"none": 4.0, "scaled_float16": 2.0, "float16": 2.0, "int8": 1.01}  # for each value of a gradient


def main() -> None:
    given = parse(__doc__ or "", (PeerArguments, TrainerArguments, *AGREED))
    network, mine = pick(PeerArguments, given), pick(TrainerArguments, given)
    silence_libraries()
    guard_children()
    report = Report()

    report.heading("This computer")
    report.run("packages", lambda: machine.check_packages(ROOT / "requirements.txt"))
    report.run("device", lambda: machine.check_device(mine.device, mine.precision))
    report.run("memory", machine.check_memory)
    report.run("shared memory", machine.check_shared_memory)
    report.run("disk", lambda: machine.check_disk(Path(network.cache_dir)))
    report.run("open files", machine.check_open_files)
    report.run("codecs", machine.check_codecs_here)
    if get_token() is not None:
        report.run("Hub token", check_hub_token)
    if "wandb" in given.get("report_to", ()):
        report.run("W&B login", check_wandb_login)

    if network.initial_peers:
        report.heading("The swarm")
        check_swarm(report, given, network, mine)
    else:
        report.console.line(
            "\nOnly this computer was looked at: give --initial_peers ADDRESS to look at a run as well."
        )
    report.end(network.initial_peers)


def silence_libraries() -> None:
    """What matters of their messages comes back as a finding."""
    logging.getLogger("hivemind").setLevel(logging.CRITICAL)
    os.environ["DATASETS_VERBOSITY"] = "error"


class Report:
    """Runs checks one after the other, prints what each finds, and ends with what to do."""

    def __init__(self) -> None:
        self.console = Console()
        self.findings: list[Finding] = []

    def heading(self, text: str) -> None:
        self.console.line(f"\n{text}")

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        mark = f"{finding.verdict:<8}"
        if self.console.is_terminal:
            mark = f"\x1b[{COLOURS[finding.verdict]}m{mark}\x1b[0m"
        self.console.line(f"  {mark}{finding.check:<14} {self._wrapped(finding.message, 25)}")

    def run(self, check: str, work: Callable[[], Finding], seconds: float = SECONDS) -> None:
        """One check, with a time limit of its own; whatever happens in it becomes a finding."""
        self.console.live(f"  checking: {check} ...")
        findings: list[Finding] = []

        def attempt() -> None:
            try:
                findings.append(work())
            except UserError as error:
                findings.append(Finding.of_error(check, error))
            except Exception as error:  # noqa: BLE001 - a broken check must not hide what the others find
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                findings.append(Finding(check, "unknown", f"Could not be checked ({reason})."))

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(seconds)
        self.add(findings[0] if findings else Finding(check, "unknown", f"Not done within {seconds:.0f} seconds."))

    def end(self, initial_peers: Sequence[str]) -> None:
        """What to do next. The status of the program is 1 if something failed."""
        failed = any(finding.verdict == "failed" for finding in self.findings)
        todo: dict[str, list[str]] = {}
        for finding in sorted(self.findings, key=lambda finding: finding.verdict != "failed"):
            if finding.verdict in ("failed", "warning"):
                todo.setdefault(finding.advice or finding.message, []).append(finding.check)
        if todo:
            self.console.line("\nWhat to do next")
        for number, (what, checks) in enumerate(todo.items(), 1):
            text = f"{', '.join(checks)}: {what}"
            self.console.line(f"  {number}. {self._wrapped(text, 5)}")
        unclear = any(finding.verdict == "unknown" for finding in self.findings)
        fine = "Nothing was found that stands in the way" if unclear else "Everything is fine"
        if not failed and initial_peers:
            opening = "These are only warnings; you can join" if todo else f"{fine}. Join"
            self.console.line(f"\n{opening} with:\n\n  python run_trainer.py {shlex.join(sys.argv[1:])}")
        elif not todo:
            self.console.line(f"\n{fine}.")
        if failed:
            sys.exit(1)

    def _wrapped(self, text: str, indent: int) -> str:
        """On a terminal in lines that fit; into a log in one."""
        if not self.console.is_terminal:
            return text
        width = max(60, shutil.get_terminal_size().columns) - 1
        return textwrap.fill(
            text, width, initial_indent=" " * indent, subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        ).lstrip()  # fmt: skip


# ---- the swarm ---------------------------------------------------------------------------------------------------


def check_swarm(report: Report, given: Mapping[str, Any], network: PeerArguments, mine: TrainerArguments) -> None:
    report.console.live("  dialling each address ...")
    answers = diagnose_peers(network.initial_peers)
    for answer in answers:
        report.add(answer)
    report.add(clock_finding(answers))
    good = [answer.address for answer in answers if answer.verdict == "ok"]
    unclear = [answer.address for answer in answers if answer.verdict == "unknown"]
    if not good and not unclear:
        report.add(Finding("run", "unknown", "Not looked at: no peer can be joined through."))
        return
    if good and network.identity_path and Path(network.identity_path).exists():
        identity_path = network.identity_path
        report.run("identity", lambda: identity_finding(identity_path, good))

    report.console.live("  joining ...")
    try:
        # Under another name, so that a trainer with this identity may go on; on the port that the trainer will take.
        peer = Peer(
            **network.peer_options()
            | {"initial_peers": good + unclear, "identity_path": None, "client_mode": network.client_mode == "true"}
        )
    except UserError as error:
        report.add(Finding.of_error("joining", error))
        return
    with contextlib.closing(peer):
        visit = Visit(peer, Path(network.cache_dir), network.organizer)
        report.run("run", lambda: visit.check_run(given), seconds=60.0)
        report.run("reachable", lambda: check_reachable(peer))
        if visit.manifest:
            report.run("data", visit.check_data, seconds=60.0)
        report.run("bandwidth", visit.check_bandwidth, seconds=60.0)
    if visit.parameters:
        report.run("room", lambda: check_room(mine, visit.parameters))


class Visit:
    """A short stay in the swarm; each check adds to what is known of the run."""

    def __init__(self, peer: Peer, cache_dir: Path, organizer: str | None) -> None:
        self.peer, self.cache_dir, self.organizer = peer, cache_dir, organizer
        self.manifest: Manifest | None = None
        self.parameters = 0

    def check_run(self, given: Mapping[str, Any]) -> Finding:
        """What the swarm trains, and whether this installation fits.

        :raises UserError: there is no manifest, the versions differ, or what this person gave contradicts the run.
        """
        manifest = fetch_manifest(self.peer, self.cache_dir, self.organizer)
        settings = manifest.latest
        refuse_contradictions(given, settings)
        manifest.refuse_other_versions()
        find_task(settings["task"]).refuse_other_files(given, manifest.unpack(self.cache_dir))
        self.manifest = manifest
        self.peer.dht.add_validators(
            run_validators(settings["run_id"], manifest.swarm_id, settings["metadata_expiration"])
        )
        records = read_records(self.peer, settings["run_id"])
        step = max((record.step for record in records), default=0)
        progress = f"step {step:,} of {settings['max_global_steps']:,}, {len(records)} trainers report"
        return Finding("run", "ok", f"{settings['run_id']} ({settings['task']}): {progress}; versions are the same.")

    def check_data(self) -> Finding:
        """Make one sample as the trainer would. :raises UserError: why there is none."""
        assert self.manifest is not None
        settings = self.manifest.latest | {"shuffle_buffer": 1}  # else the first sample comes when the buffer is full
        task = find_task(settings["task"])(settings, self.manifest.unpack(self.cache_dir), self.cache_dir)
        self.parameters = sum(param.numel() for param in task.model.parameters())
        next(task.batches(lambda: 1, place="doctor", step=lambda: 0))
        return Finding("data", "ok", f"A sample could be made: {task.description().get('Data', settings['task'])}.")

    def check_bandwidth(self) -> Finding:
        """The link to the first peer that lets it be measured."""
        failures = []
        for peer_id in dict.fromkeys(map(peer_id_in, self.peer.initial_peers)):
            try:
                link = measure_bandwidth(self.peer, peer_id, timeout=25.0)
            except OSError as error:
                failures.append(f"{peer_id[-6:]}: {error}")
            else:
                return self.judge(link, f"to peer {peer_id[-6:]}")
        return Finding("bandwidth", "unknown", f"No peer could be measured against ({'; '.join(failures)}).")

    def judge(self, link: Bandwidth, whereto: str) -> Finding:
        what = f"{link.down:.1f} Mbit/s down, {link.up:.1f} up, {whereto}"
        if self.manifest is None or not self.parameters:
            return Finding("bandwidth", "ok", f"{what}.")
        settings = self.manifest.latest
        # In an all-reduce a peer sends twice its gradient at most, and receives as much.
        megabits = 2 * 8e-6 * self.parameters * WIRE_BYTES[settings["grad_compression"]]
        seconds, limit = megabits / min(link.down, link.up), settings["averaging_timeout"]
        what += f": {seconds:.1f} s for each averaging of this model"
        if seconds < limit / 2:
            return Finding("bandwidth", "ok", f"{what}.")
        return Finding(
            "bandwidth",
            "warning",
            f"{what}, and after {limit:.0f} s the others go on without you.",
            f"Find a faster link, or leave more of the work to others: --bandwidth {max(1, link.up):.0f}",
        )


def check_reachable(peer: Peer) -> Finding:
    """Whether others can connect to this computer."""
    if peer.client_mode:
        return Finding("reachable", "ok", "Not needed: in client mode this peer accepts no connections.")
    found = check_reachability(peer)
    if found.verdict == "reachable":
        return Finding("reachable", "ok", f"Others can connect to this computer at {found.address}.")
    if found.verdict == "unknown":
        return Finding("reachable", "unknown", f"Not known: {found.reason}.")
    what = f"Others cannot connect to {found.address} ({found.reason}): this computer will take part in client mode."
    return Finding("reachable", "warning", what, advice(found, peer.host_maddrs))


def check_room(mine: TrainerArguments, parameters: int) -> Finding:
    """Device, memory and shared memory once more, now that the size of the model is known: what is too small."""
    for finding in (
        machine.check_device(mine.device, mine.precision, parameters),
        machine.check_memory(parameters),
        machine.check_shared_memory(parameters),
    ):
        if finding.verdict == "failed":
            return finding
    return Finding("room", "ok", f"This computer has room for the model's {parameters / 1e6:.1f} M parameters.")


# ---- accounts ----------------------------------------------------------------------------------------------------


def check_hub_token() -> Finding:
    """Whether the Hub accepts the token that is set; a bad one is refused even for what everybody may read."""
    try:
        name = HfApi().whoami()["name"]
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            return Finding("Hub token", "unknown", f"The Hub gave HTTP {error.response.status_code} for an answer.")
        return Finding(
            "Hub token",
            "failed",
            f"The Hugging Face Hub refuses the token that is set (HTTP {error.response.status_code}).",
            "Log in again with `hf auth login`, or take the variable HF_TOKEN out: public text needs no token.",
        )
    except (httpx.HTTPError, OSError) as error:  # its text is not shown: it may quote the request, token included
        return Finding("Hub token", "unknown", f"The Hub cannot be reached ({type(error).__name__}).")
    return Finding("Hub token", "ok", f"It is {name}'s.")


def check_wandb_login() -> Finding:
    """Whether Weights & Biases would find a login; it is not tried."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Finding("W&B login", "ok", "It is set in the environment.")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai"):
            return Finding("W&B login", "ok", "This computer is logged in.")
    login = "Type `wandb login`, or set WANDB_MODE=offline."
    return Finding("W&B login", "failed", "report_to has wandb, but nobody is logged in there.", login)


if __name__ == "__main__":
    run_program(main)
