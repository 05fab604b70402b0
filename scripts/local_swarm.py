"""Run a whole swarm on this machine: one auxiliary peer and some trainers, each a process of its own.

    python scripts/local_swarm.py --config configs/demo.yaml --trainers 2

The auxiliary peer's output is shown; the trainers write to RUN_FOLDER/logs. It ends when the run is complete, or with
Ctrl-C, and leaves no process behind. Options after `--` go to every peer.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import read_config  # noqa: E402
from collab.errors import UserError  # noqa: E402
from collab.processes import run_program  # noqa: E402

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
START_SECONDS = 300.0  # the tokenizer of a big corpus takes its time
LEAVE_SECONDS = 40.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="the run's YAML file")
    parser.add_argument("--trainers", type=int, default=2, help="how many trainers to start")
    parser.add_argument("--run_folder", type=Path, help="where to keep the run; emptied first. Default: runs/RUN_ID")
    parser.add_argument(
        "--keep_weights", action="store_true", help="trainers save their last weights in RUN_FOLDER/peers"
    )
    parser.add_argument("rest", nargs="*", help="further options for every peer, after `--`")
    options = parser.parse_args(argv)
    options.config, options.run_folder = (path and path.absolute() for path in (options.config, options.run_folder))
    config = read_config(options.config)
    os.chdir(ROOT)  # so that every path that people see is short
    run_folder: Path = options.run_folder or Path("runs", config.get("run_id", "run"))
    remove_old_run(run_folder)
    logs = run_folder / "logs"

    with LocalSwarm(options.config, run_folder, options.rest) as swarm:
        auxiliary = swarm.start_auxiliary()
        address = swarm.address(auxiliary)
        for number in range(1, options.trainers + 1):
            name = f"trainer-{number}"
            own = ["--threads", str(max(1, (os.cpu_count() or 1) // options.trainers))]
            if options.keep_weights:
                own += ["--save_dir", str(run_folder / "peers" / name)]
            swarm.start_trainer(name, address, *own)
        try:
            status = auxiliary.wait()
        except KeyboardInterrupt:  # every peer got it too; they say goodbye while the swarm is left
            status = 0
    if status:
        raise UserError(f"The auxiliary peer ended with status {status}. The trainers' logs are in {logs}.")


class LocalSwarm(contextlib.ExitStack):
    """Peers of one run on this machine; those that are left when the block ends are ended, the last one first.

    :param run_folder: the auxiliary peer's; the others' output goes to `logs` in it.
    :param options: for every peer.
    :param environment: added to this process's.
    """

    def __init__(
        self, config: Path, run_folder: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.config, self.run_folder, self.logs = config, run_folder, run_folder / "logs"
        self._options = options
        self._environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {})

    def start(self, program: str, *arguments: str, log: str | None) -> subprocess.Popen[bytes]:
        """Start one of this repository's programs; its output goes to the file `log` in `logs`, or is shown."""
        self.logs.mkdir(parents=True, exist_ok=True)
        output = self.enter_context((self.logs / log).open("ab")) if log else None
        command = [sys.executable, program, *arguments, *self._options]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=self._environment)
        self.callback(end, process)
        return process

    def start_auxiliary(self, *arguments: str, log: str | None = None) -> subprocess.Popen[bytes]:
        (self.run_folder / "join.txt").unlink(missing_ok=True)
        own = ["--config", str(self.config), "--run_folder", str(self.run_folder), *arguments]
        return self.start("run_aux_peer.py", *own, log=log)

    def start_trainer(self, name: str, address: str, *arguments: str) -> subprocess.Popen[bytes]:
        own = ["--initial_peers", address, "--host_maddrs", LOOPBACK, "--public_name", name, *arguments]
        return self.start("run_trainer.py", *own, log=f"{name}.log")

    def address(self, auxiliary: subprocess.Popen[bytes]) -> str:
        return wait_for_address(auxiliary, self.run_folder / "join.txt")


def remove_old_run(run_folder: Path) -> None:
    """Empty the folder of an earlier run, and of nothing else."""
    if run_folder.exists() and any(run_folder.iterdir()):
        if not any((run_folder / mark).exists() for mark in ("logs", "join.txt", "identity.key")):
            raise UserError(f"{run_folder} is not the folder of a run: it is left alone. Give another --run_folder.")
        shutil.rmtree(run_folder)


def wait_for_address(auxiliary: subprocess.Popen[bytes], join_file: Path) -> str:
    """The address on this machine at which the auxiliary peer takes newcomers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if join_file.exists():
            address = join_file.read_text().split()[-1]
            # Peers that listen on the loopback only have to meet there: libp2p does not pass on loopback addresses
            # over any other interface.
            return re.sub(r"^/ip[46]/[^/]+", "/ip4/127.0.0.1", address)
        if auxiliary.poll() is not None:
            raise UserError("The auxiliary peer did not start; its message is above.")
        time.sleep(0.1)
    raise UserError(f"The auxiliary peer was not ready after {START_SECONDS:.0f} seconds.")


def end(process: subprocess.Popen[bytes]) -> None:
    """Let a peer finish on its own, ask it to leave, and end it if it does not."""
    if process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LEAVE_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()


if __name__ == "__main__":
    run_program(main)
