"""The program of who hosts experts: claim some of a run's, serve, train and save them.

    python run_expert_server.py --initial_peers ADDRESS

ADDRESS is the line that the run's auxiliary peer prints. It needs a port that others can reach. When it is started
again, its experts go on from where they were.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from arguments import HostArguments, PeerArguments, option, parse, pick, require
from collab.changes import ChangeWatch
from collab.console import Console, show_log
from collab.device import pick_devices
from collab.errors import UserError
from collab.experts.server import ExpertHost
from collab.files import make_folder
from collab.lookout import Lookout
from collab.manifest import fetch_manifest
from collab.metrics import ask_for_auxiliaries, auxiliaries_in, is_live, run_validators, wait_until_saved
from collab.peer import Peer
from collab.processes import StopSignal, guard_children, run_program
from collab.reachability import start_peer
from tasks import expert_plan

DEFAULT_EXPERTS = 4
LINE_SECONDS = 30.0


@dataclass
class ServerArguments:
    """The machine that serves."""

    _argument_group_name = "this computer"

    public_name: str = option("", "The name under which its experts are listed. Empty: the end of the peer id.")
    device: str = option("auto", "Where experts compute: cpu, cuda, cuda:1; auto takes a GPU if there is one.")
    threads: int = option(0, "CPU threads of the experts; 0 leaves it to PyTorch.")

    def __post_init__(self) -> None:
        require(len(self.public_name) <= 40, "public_name", self.public_name, "at most 40 characters")
        require(self.threads >= 0, "threads", self.threads, "0 or more")


def main() -> None:
    given = parse(__doc__ or "", (PeerArguments, HostArguments, ServerArguments))
    network, hosting, mine = pick(PeerArguments, given), pick(HostArguments, given), pick(ServerArguments, given)
    if not network.initial_peers:
        raise UserError(
            "Experts belong to a run that goes on: give --initial_peers ADDRESS, as the run's auxiliary peer prints it."
        )
    device, folder = pick_devices(mine.device)[0], Path(hosting.expert_folder)
    if mine.threads:
        torch.set_num_threads(mine.threads)
    make_folder(folder)
    if network.identity_path is None:
        network.identity_path = str(folder / "identity.key")  # the same peer after a restart: its experts are its own
    console, stop = Console(), StopSignal()
    show_log()
    guard_children()

    # ---- join: find the swarm, learn what its experts are
    with contextlib.closing(start_peer(**network.peer_options())) as peer:
        manifest = fetch_manifest(peer, Path(network.cache_dir), network.organizer)
        manifest.refuse_other_versions()
        settings, run_folder = manifest.settings, manifest.unpack(Path(network.cache_dir))
        manifest.serve(peer, run_folder)
        run_id, lifetime = settings["run_id"], settings["metadata_expiration"]
        peer.dht.add_validators(run_validators(run_id, manifest.swarm_id, lifetime))
        plan = expert_plan(settings, run_folder, manifest.swarm_id)
        if plan is None:
            raise UserError(
                f"The run {run_id} has no experts: its task is {settings['task']}. Train with run_trainer.py instead."
            )
        name = mine.public_name or peer.peer_id[-6:]
        console.line(f"{name} joins the run {run_id} and serves experts on {device}")

        # ---- serve, until the run is complete or somebody stops this program
        host = ExpertHost(
            peer,
            plan,
            run_id,
            lifetime,
            wanted=hosting.serve_experts or DEFAULT_EXPERTS,
            folder=folder,
            name=name,
            save_seconds=hosting.expert_save_seconds,
            device=device,
        )
        stop.listen()
        lookout = Lookout(peer, manifest.swarm_id, lifetime)
        changes = ChangeWatch(peer, manifest, run_folder, lifetime)
        try:
            console.line(f"Serving the experts {', '.join(map(str, host.experts))} of {plan.total}")
            while not stop:
                last_step = changes.manifest.latest["max_global_steps"]
                if wait_until_saved(peer, run_id, last_step, LINE_SECONDS, stop):
                    wait_until_measured(peer, run_id, lifetime, stop)
                    console.line("The run is complete")
                    break
                steps = ", ".join(f"{index}: {expert.steps:,}" for index, expert in host.experts.items())
                console.line(f"Steps of the experts: {steps}")
        finally:
            changes.stop()
            lookout.stop()
            host.stop()
            console.line(f"Saved in {folder}")


def wait_until_measured(peer: Peer, run_id: str, lifetime: float, stop: StopSignal) -> None:
    """Stay for the auxiliary peers, which measure the last checkpoint with its experts, until they have left."""
    while any(is_live(each, lifetime) for each in auxiliaries_in(ask_for_auxiliaries(peer, run_id).result())):
        if stop.wait(1.0):
            break


if __name__ == "__main__":
    run_program(main)
