"""Put a swarm on this machine through random faults, and see whether it is still one swarm with one model afterwards.

    python scripts/chaos.py --minutes 20 --seed 0

An auxiliary peer and some trainers run for so many minutes, and every few seconds something happens to one of them: it
is killed, freezes, leaves, is joined by another one, loses a child process, or the computer is busy. Then the faults
end, and what must hold is looked at; after that the same run goes undisturbed for as many samples, to compare the
loss. The first trainer freezes and stumbles like all others, but is neither killed nor asked to leave, so that growth
of its memory would be seen.

Exit status 1 if something does not hold. Programs' output stays in RUN_FOLDER/logs.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import read_config  # noqa: E402
from collab.console import duration  # noqa: E402
from collab.errors import UserError  # noqa: E402
from collab.processes import run_program  # noqa: E402
from collab.trackers import HISTORY, read_history  # noqa: E402
from collab.vital import has_ended  # noqa: E402
from collab.watch import TOLERANCE  # noqa: E402
from scripts.local_swarm import LEAVE_SECONDS, LocalSwarm, remove_old_run  # noqa: E402

LOOK_SECONDS = 2.0
WARM_SECONDS = 120.0  # after which a process should have all the memory and files that it needs
WINDOW_SECONDS = 60.0  # of which the median counts: within a step, memory comes and goes by a tenth
START_SECONDS = 240.0
CALM_STEPS = 3  # global steps without a fault in which everybody has to meet, before the end is looked at
CALM_SECONDS = 240.0
GROWTH, SLACK_BYTES, SLACK_FILES = 1.10, 8 * 2**20, 16  # Go's collector alone moves a small p2pd by some MB
SAME_LOSS = 0.03
LOSS_SHARE = 0.2  # of all samples, the last ones, whose loss is compared
MOST_TRAINERS = 5
# In the temporary folder: a cache that is meant to stay, and the folder, with a socket in it, that PyTorch's helper
# leaves if its program ends while the helper starts.
EXEMPT = ("torchinductor_", "torch-shm-dir-")
BUSY = "import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"


@dataclass
class Needs:
    """What a process had when it was warm, and lately: bytes of memory and open files, at each look."""

    command: str
    started: float
    warm: list[tuple[int, int]] = field(default_factory=list)
    late: deque[tuple[int, int]] = field(default_factory=partial(deque, maxlen=round(WINDOW_SECONDS / LOOK_SECONDS)))

    def note(self, process: psutil.Process) -> None:
        age = time.time() - self.started
        self.late.append((process.memory_info().rss, process.num_fds()))
        if WARM_SECONDS <= age < WARM_SECONDS + WINDOW_SECONDS:
            self.warm.append(self.late[-1])

    def before_and_now(self, index: int) -> tuple[float, float]:
        """Medians of memory (0) or of open files (1)."""
        warm, late = (statistics.median(look[index] for look in looks) for looks in (self.warm, self.late))
        return warm, late


@dataclass
class Program:
    """One peer: a program of ours with its children."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    frozen_until: float = 0.0
    frozen: list[psutil.Process] = field(default_factory=list)
    family: dict[int, psutil.Process] = field(default_factory=dict)
    needs: dict[int, Needs] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def members(self) -> list[psutil.Process]:
        """All of its processes that run now, itself first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            me = psutil.Process(self.process.pid)
            found = [me, *me.children(recursive=True)]
            self.family |= {process.pid: process for process in found}
            return found
        return []

    @property
    def step(self) -> int:
        """The last global step of which it has told; 0 before the first one."""
        since_start = self.log.read_text(errors="replace").rpartition("Starting anew")[2]
        told = re.findall(r"^step +(\d+)/", since_start, re.MULTILINE)
        return int(told[-1]) if told else 0

    def child(self, kind: str) -> psutil.Process | None:
        """One of its processes: "p2pd", the "dht" that has started it, or an "averager"."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = {process.pid: process for process in self.members()[1:]}
            daemon = next((process for process in children.values() if process.name() == "p2pd"), None)
            if kind == "p2pd" or daemon is None:
                return daemon
            if kind == "dht":
                return children.get(daemon.ppid())
            forks = [process for process in children.values() if process.name().startswith("python")]
            return next((process for process in forks if process.pid != daemon.ppid()), None)
        return None

    def freeze(self, processes: Sequence[psutil.Process], seconds: float) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        self.frozen, self.frozen_until = list(processes), time.monotonic() + seconds

    def thaw(self) -> None:
        for process in reversed(self.frozen):  # the program itself last, as nobody shall miss its answer
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self.frozen = []

    def note_needs(self) -> None:
        """Note what its processes need now."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                known = Needs(f"{self.name}: {process.name()}", process.create_time())
                self.needs.setdefault(process.pid, known).note(process)

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")

    def survivors(self) -> list[psutil.Process]:
        return [process for process in self.family.values() if not has_ended(process)]


class Chaos:
    """A swarm to which things happen."""

    def __init__(self, swarm: LocalSwarm, options: argparse.Namespace) -> None:
        self._swarm, self._port, self.size, self._every = swarm, free_port(), options.trainers, options.every
        self.random, self._faults = random.Random(options.seed), sorted(options.only)
        self.trainers: list[Program] = []
        self.ended: list[Program] = []
        self.wrong: list[str] = []
        """What happened that must not."""
        self.done: dict[str, int] = {}
        """How often each fault was made."""
        self._deck: list[str] = []
        self._count = 0
        self._bursts: list[subprocess.Popen[bytes]] = []
        self.ports: set[int] = {self._port}
        self.auxiliary = self._start_auxiliary()
        self._address = swarm.address(self.auxiliary.process)  # with its port and its identity it stays the same
        for _ in range(self.size):
            self._join()

    # ---- who is there

    @property
    def programs(self) -> list[Program]:
        return [self.auxiliary, *self.trainers]

    @property
    def everybody(self) -> list[Program]:
        return [*self.programs, *self.ended]

    def _start_auxiliary(self) -> Program:
        at = ["--host_maddrs", f"/ip4/127.0.0.1/tcp/{self._port}"]
        process = self._swarm.start_auxiliary(*at, log="auxiliary.log")
        return Program("auxiliary", process, self._swarm.logs / "auxiliary.log")

    def _join(self) -> Program:
        self._count += 1
        name = f"trainer-{self._count}"
        own = ["--threads", "1", "--micro_batch_size", "16", "--precision", "float32"]
        own += ["--save_dir", str(self._swarm.run_folder / "peers" / name)]
        process = self._swarm.start_trainer(name, self._address, *own)
        self.trainers.append(Program(name, process, self._swarm.logs / f"{name}.log"))
        return self.trainers[-1]

    def history(self) -> list[dict[str, Any]]:
        return read_history(self._swarm.run_folder / HISTORY)

    def look(self) -> None:
        """Thaw what was frozen long enough, note what processes need, and replace who has ended on its own."""
        for program in self.programs:
            if program.frozen and time.monotonic() >= program.frozen_until:
                program.thaw()
            program.note_needs()
            for process in program.members():
                with contextlib.suppress(psutil.Error):
                    self.ports |= {c.laddr.port for c in process.net_connections("tcp") if c.status == "LISTEN"}
        for trainer in [trainer for trainer in self.trainers if not trainer.is_running]:
            say(f"{trainer.name} has ended with status {trainer.process.returncode}: {trainer.last_line()[:90]}")
            self._gone(trainer)
            self._join()
        if not self.auxiliary.is_running:
            say(f"The auxiliary peer has ended with status {self.auxiliary.process.returncode}; started again")
            self._replace_auxiliary()

    def wait(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> bool:
        """Look on for so long, or until the condition is true; gives whether it is."""
        until = time.monotonic() + seconds
        while not (there := condition()) and time.monotonic() < until:
            self.look()
            time.sleep(min(LOOK_SECONDS, max(0.0, until - time.monotonic())))
        return there

    def _gone(self, trainer: Program) -> None:
        self.trainers.remove(trainer)
        self.ended.append(trainer)

    def _replace_auxiliary(self) -> None:
        self.ended.append(self.auxiliary)
        self.auxiliary = self._start_auxiliary()

    # ---- faults: each says what it does

    def strike(self) -> str:
        """Let something happen, each kind once before any comes again."""
        if not self._deck:
            self._deck = list(self._faults)
            self.random.shuffle(self._deck)
        fault = self._deck.pop()
        self.done[fault] = self.done.get(fault, 0) + 1
        return FAULTS[fault](self)

    def _victim(self, spared: int = 0) -> Program:
        """Somebody who trains, if there is anybody."""
        possible = [trainer for trainer in self.trainers[spared:] if not trainer.frozen]
        return self.random.choice([trainer for trainer in possible if trainer.step] or possible or self.trainers[-1:])

    def _seconds(self) -> float:
        return self.random.uniform(0.25, 0.75) * self._every

    def kill(self) -> str:
        victim = self._victim(spared=1)
        victim.members()
        victim.thaw()
        victim.process.kill()
        victim.process.wait()
        self._gone(victim)
        return f"SIGKILL of {victim.name}; {self._join().name} comes"

    def freeze(self) -> str:
        victim, seconds = self._victim(), self._seconds()
        victim.freeze(victim.members(), seconds)
        return f"{victim.name} is frozen for {seconds:.0f} s"

    def freeze_daemon(self) -> str:
        victim, seconds = self._victim(), self._seconds()
        if daemon := victim.child("p2pd"):
            victim.freeze([daemon], seconds)
        return f"The p2pd of {victim.name} is frozen for {seconds:.0f} s"

    def leave(self) -> str:
        victim = self._victim(spared=1)
        victim.members()
        victim.thaw()
        has_joined = victim.step > 0  # before that, SIGTERM ends it at once, as it does any program
        victim.process.terminate()
        try:
            status = victim.process.wait(LEAVE_SECONDS)
            if status and has_joined:
                self.wrong.append(f"{victim.name} was asked to leave and ended with status {status}")
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{victim.name} was asked to leave and did not within {LEAVE_SECONDS:.0f} s")
            victim.process.kill()
            victim.process.wait()
        self._gone(victim)
        if len(self.trainers) < self.size:
            self._join()
        return f"{victim.name} leaves; {len(self.trainers)} trainers"

    def join(self) -> str:
        if len(self.trainers) >= MOST_TRAINERS:
            return self.leave()
        return f"{self._join().name} comes; {len(self.trainers)} trainers"

    def kill_auxiliary(self) -> str:
        self.auxiliary.members()
        self.auxiliary.process.kill()
        self.auxiliary.process.wait()
        self._replace_auxiliary()
        return "SIGKILL of the auxiliary peer; it is started again"

    def kill_child(self, kind: str) -> str:
        victim = self._victim(spared=1)
        child = victim.child(kind)
        if child is None:
            return f"{victim.name} has no {kind} yet: nothing happens"
        child.kill()
        return f"SIGKILL of the {kind} of {victim.name}"

    def busy(self) -> str:
        seconds = self._seconds()
        command = [sys.executable, "-c", BUSY.format(seconds=seconds)]
        self._bursts += [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
        return f"The computer is busy for {seconds:.0f} s"

    # ---- the end

    def calm(self) -> bool:
        """No more faults: wait until all have met in some global steps, and give whether they have."""
        for program in self.programs:
            program.thaw()
        first = len(self.history())

        def met() -> bool:
            lately = self.history()[first:][-CALM_STEPS:]
            everybody = len(self.trainers)
            return len(lately) == CALM_STEPS and all(
                step["peers_full"] == step["peers_met"] == everybody for step in lately
            )

        return self.wait(CALM_SECONDS, met)

    def end(self) -> None:
        """All trainers leave right after a global step, the auxiliary peer after them."""
        for program in self.programs:
            program.members()
        first, until = max(trainer.step for trainer in self.trainers), time.monotonic() + CALM_SECONDS
        while time.monotonic() < until:
            steps = {trainer.step for trainer in self.trainers}
            if len(steps) == 1 and min(steps) > first:
                break
            time.sleep(0.05)
        for trainer in self.trainers:
            trainer.process.terminate()
        for program in [*self.trainers, self.auxiliary]:
            if program is self.auxiliary:
                program.process.terminate()
            try:
                if status := program.process.wait(LEAVE_SECONDS):
                    self.wrong.append(f"{program.name} ended with status {status} at last: {program.last_line()[:90]}")
            except subprocess.TimeoutExpired:
                self.wrong.append(f"{program.name} did not end")
        for burst in self._bursts:
            burst.wait()


FAULTS: dict[str, Callable[[Chaos], str]] = {
    "kill": Chaos.kill,
    "freeze": Chaos.freeze,
    "freeze_p2pd": Chaos.freeze_daemon,
    "leave": Chaos.leave,
    "join": Chaos.join,
    "kill_auxiliary": Chaos.kill_auxiliary,
    "kill_p2pd": lambda chaos: chaos.kill_child("p2pd"),
    "kill_dht": lambda chaos: chaos.kill_child("dht"),
    "kill_averager": lambda chaos: chaos.kill_child("averager"),
    "busy": Chaos.busy,
}


# ---- what must hold ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One line of the table at the end."""

    what: str
    holds: bool | None
    """None: it was not looked at."""
    seen: str


def one_model(folder: Path, trainers: Sequence[Program]) -> Finding:
    """The weights that trainers saved when they left: those of one step, and the same."""
    what = "one model"
    saved = [folder / "peers" / trainer.name for trainer in trainers]
    if missing := [path.name for path in saved if not (path / "model.safetensors").exists()]:
        return Finding(what, False, f"{', '.join(missing)} saved no weights")
    steps = {json.loads((path / "trainer_state.json").read_text())["global_step"] for path in saved}
    first, *others = [load_file(path / "model.safetensors") for path in saved]

    def apart(other: dict[str, torch.Tensor]) -> float:
        difference = sum(float((first[name] - other[name]).square().sum()) for name in first)
        return float((difference / sum(float(tensor.square().sum()) for tensor in first.values())) ** 0.5)

    most = max(map(apart, others), default=0.0)
    seen = f"{len(saved)} trainers, steps {sorted(steps)}, at most {most:.1e} of their size apart"
    return Finding(what, len(steps) == 1 and most <= TOLERANCE, seen)


def same_loss(disturbed: Sequence[dict[str, Any]], undisturbed: Sequence[dict[str, Any]]) -> Finding:
    samples = min(sum(step["samples"] for step in run) for run in (disturbed, undisturbed))
    one, other = (mean_loss(run, (1 - LOSS_SHARE) * samples, samples) for run in (disturbed, undisturbed))
    seen = f"{one:.3f} and {other:.3f} undisturbed, both over the last {LOSS_SHARE:.0%} of {samples:,.0f} samples"
    return Finding(f"loss within {SAME_LOSS:.0%} of an undisturbed run", one <= (1 + SAME_LOSS) * other, seen)


def mean_loss(history: Sequence[dict[str, Any]], first: float, last: float) -> float:
    """Over the global steps from one number of samples to another."""
    so_far, losses = 0.0, []
    for step in history:
        so_far += step["samples"]
        if first <= so_far <= last:
            losses.append(step["loss"])
    return statistics.mean(losses) if losses else float("nan")


def growth(programs: Sequence[Program]) -> Iterator[Finding]:
    """Memory and open files of every process that has lived for twice the time that it needs to get warm."""
    old = [
        needs
        for program in programs
        for needs in program.needs.values()
        if needs.warm and time.time() - needs.started >= 2 * WARM_SECONDS
    ]
    for index, what, unit, slack in [(0, "memory", 2**20, SLACK_BYTES), (1, "open files", 1, SLACK_FILES)]:
        name = f"{what} within {GROWTH - 1:.0%} of what it was after {duration(WARM_SECONDS)}"
        if not old:
            yield Finding(name, None, "no process lived long enough")
            continue
        found = [(*needs.before_and_now(index), needs.command) for needs in old]
        share, warm, late, worst = max(
            (late / max(GROWTH * warm, warm + slack), warm, late, of) for warm, late, of in found
        )
        seen = (
            f"{len(old)} processes; most: {worst}, {warm / unit:.0f} to {late / unit:.0f}{' MiB' if index == 0 else ''}"
        )
        yield Finding(name, share <= 1, seen)


def no_orphan(programs: Sequence[Program]) -> Finding:
    left = wait_for_none(lambda: [process for program in programs for process in program.survivors()])
    return Finding("no orphan process", not left, ", ".join(map(str, left)) or f"{len(programs)} programs have ended")


def no_port(ports: set[int]) -> Finding:
    def taken() -> list[int]:
        found = []
        for port in sorted(ports):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    found.append(port)
        return found

    left = wait_for_none(taken)
    return Finding("no leaked port", not left, f"of {len(ports)}: {', '.join(map(str, left)) or 'none'}")


def no_file(temporary: Path, folder: Path, programs: Sequence[Program]) -> Finding:
    pids = {str(pid) for program in programs for pid in program.family}

    def found() -> list[Path]:
        files = [path for path in temporary.iterdir() if not path.name.startswith(EXEMPT)]
        files += [path for path in Path("/dev/shm").glob("torch_*") if path.name.split("_")[1] in pids]
        return files + [path for kind in ("partial", "old") for path in folder.rglob(f".*.{kind}")]

    left = wait_for_none(found)
    return Finding("no temporary file", not left, ", ".join(map(str, left[:5])) or "none")


def wait_for_none(find: Callable[[], list[Any]], seconds: float = 10.0) -> list[Any]:
    """What is still found after so many seconds: what watchers clear up takes some."""
    until = time.monotonic() + seconds
    while (found := find()) and time.monotonic() < until:
        time.sleep(0.2)
    return found


# ---- the runs ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults happen (default: %(default)g)")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two of them (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults: which, to whom, for how long")
    parser.add_argument(
        "--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT", help=f"of {', '.join(FAULTS)}"
    )
    parser.add_argument("--trainers", type=int, default=3, help="how many there are at first (default: %(default)d)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="the run's YAML file")
    parser.add_argument(
        "--run_folder", type=Path, default=ROOT / "runs" / "chaos", help="emptied first. Default: runs/chaos"
    )
    parser.add_argument("--cache_dir", type=Path, help="of all programs; default: a folder in the run's")
    parser.add_argument(
        "--skip_reference", action="store_true", help="do not compare the loss with an undisturbed run's"
    )
    options = parser.parse_args(argv)
    if options.trainers < 2:
        raise UserError("--trainers: at least 2, or there is nobody left when one is killed.")
    if options.minutes <= 0 or options.every <= 0:
        raise UserError("--minutes and --every: more than 0.")
    options.run_folder = options.run_folder.absolute()
    options.cache_dir = (options.cache_dir or options.run_folder / "cache").absolute()
    return options


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # all programs end before this one does
        signal.signal(number, signal.default_int_handler)
    remove_old_run(options.run_folder)
    (options.run_folder / "logs").mkdir(parents=True)
    config = options.run_folder / "run.yaml"
    # no end before that of the faults; and what only takes time is left out
    settings = {"run_id": "chaos", "max_global_steps": 100_000, "report_to": ["none"], "page_port": 0}
    config.write_text(json.dumps(read_config(options.config) | settings))
    # libp2p's sockets are in there, and their paths have to be short
    temporary = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        findings = disturb(options, config, temporary)
        tell(findings)
        if not options.skip_reference:
            disturbed = read_history(options.run_folder / HISTORY)
            findings.append(same_loss(disturbed, undisturbed(options, config, temporary, disturbed)))
            tell(findings[-1:])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if failed := [finding.what for finding in findings if finding.holds is False]:
        raise UserError(f"Did not hold: {'; '.join(failed)}. What programs said is in {options.run_folder}/logs.")


def tell(findings: Sequence[Finding]) -> None:
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        verdict = {True: "holds", False: "FAILS", None: "-"}[finding.holds]
        say(f"  {verdict:<6} {finding.what:<{width}}  {finding.seen}")


def disturb(options: argparse.Namespace, config: Path, temporary: Path) -> list[Finding]:
    """The run with faults, and what must hold after it."""
    cache = ["--cache_dir", str(options.cache_dir)]
    environment = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with LocalSwarm(config, options.run_folder, cache, environment) as swarm:
        say(f"A swarm of {options.trainers} trainers starts ...")
        chaos = Chaos(swarm, options)
        if not chaos.wait(START_SECONDS, lambda: len(chaos.history()) >= 2):
            raise UserError(f"No global step was made within {START_SECONDS:.0f} s; {swarm.logs} says why.")
        began = time.monotonic()
        ends = began + 60 * options.minutes
        while time.monotonic() < ends:
            happened = chaos.strike()
            history = chaos.history()
            left = duration(max(0.0, ends - time.monotonic()))
            say(f"{left:>9} left  step {history[-1]['step']:>4}  loss {history[-1]['loss']:.3f}  {happened}")
            chaos.wait(min(options.every, max(0.0, ends - time.monotonic())))
        say("No more faults; everybody has to meet ...")
        has_met = chaos.calm()
        history = chaos.history()
        chaos.end()
        findings = [
            Finding(
                "everybody meets again",
                has_met,
                f"{len(chaos.trainers)} trainers; the last steps met {[step['peers_met'] for step in history[-3:]]}",
            ),
            one_model(options.run_folder, chaos.trainers),
            Finding("who is asked to leave, leaves", not chaos.wrong, "; ".join(chaos.wrong) or "status 0"),
            no_gap(chaos.history()),
            *growth(chaos.programs),
            no_orphan(chaos.everybody),
            no_port(chaos.ports),
            no_file(temporary, options.run_folder, chaos.everybody),
            Finding("loss falls", history[-1]["loss"] < history[0]["loss"], losses(history)),
            Finding("faults", None, ", ".join(f"{count} {fault}" for fault, count in sorted(chaos.done.items()))),
            Finding("global steps", None, steps_in_words(history)),
        ]
    return findings


def no_gap(history: Sequence[dict[str, Any]]) -> Finding:
    steps = [step["step"] for step in history]
    missing = sorted(set(range(steps[0], steps[-1] + 1)) - set(steps))
    twice = len(steps) - len(set(steps))
    return Finding(
        "the history has every step once", not missing and not twice, f"missing {missing[:5]}, twice {twice}"
    )


def losses(history: Sequence[dict[str, Any]]) -> str:
    return f"{history[0]['loss']:.3f} to {history[-1]['loss']:.3f}"


def steps_in_words(history: Sequence[dict[str, Any]]) -> str:
    """How many, how whole, and how long the longest one took."""
    gaps = [later["time"] - sooner["time"] for sooner, later in pairwise(history)]
    rounds = sum(step["peers"] for step in history)
    full = sum(step["peers_full"] for step in history) / rounds
    averaged = sum(step["peers_averaged"] for step in history) / rounds
    return (
        f"{len(history)}; {full:.0%} of the peers' rounds met everybody, {averaged:.0%} were averaged; "
        f"a step takes {statistics.median(gaps):.1f} s, the longest took {max(gaps):.0f} s"
    )


def undisturbed(
    options: argparse.Namespace, config: Path, temporary: Path, disturbed: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The history of the same run without faults, for as many samples."""
    wanted = sum(step["samples"] for step in disturbed)
    folder = options.run_folder / "undisturbed"
    cache = ["--cache_dir", str(options.cache_dir)]
    environment = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with LocalSwarm(config, folder, cache, environment) as swarm:
        say(f"The same without faults, for {wanted:,.0f} samples ...")
        calm = Chaos(swarm, options)
        began, told = time.monotonic(), 0.0

        def done() -> bool:
            nonlocal told
            samples = sum(step["samples"] for step in calm.history())
            if samples and time.monotonic() - told > options.every:
                told = time.monotonic()
                left = (told - began) * max(0.0, wanted / samples - 1)
                say(f"{duration(left):>9} left  step {calm.history()[-1]['step']:>4}")
            return samples >= wanted

        patience = START_SECONDS + 4 * 60 * options.minutes
        if not calm.wait(patience, done):
            raise UserError(f"The undisturbed run did not get as far within {duration(patience)}.")
        calm.end()
        return calm.history()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run_program(main)
