"""A peer's part in the experts of a run: those that it serves itself, and the way to all of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from collab.errors import UserError
from collab.experts.directory import ExpertDirectory
from collab.experts.plan import ExpertPlan
from collab.experts.server import ExpertHost
from collab.peer import Peer


class JoinedExperts:
    """The experts that this peer serves, if any, and the directory of all, until `stop`.

    Those of its own are called directly, without the network.

    :param settings: the run's.
    :param name: this peer's, for people.
    :param serve_experts: how many it serves, if so many are free; 0: none.
    :param expert_folder: where they are saved, every `expert_save_seconds` and at the end.
    :raises UserError: it cannot serve any (see `ExpertHost`).
    """

    def __init__(
        self,
        peer: Peer,
        plan: ExpertPlan,
        settings: Mapping[str, Any],
        name: str,
        *,
        device: torch.device,
        serve_experts: int,
        expert_folder: str,
        expert_save_seconds: float,
    ) -> None:
        lifetime, run_id = settings["metadata_expiration"], settings["run_id"]
        self.host: ExpertHost | None = None
        if serve_experts:
            self.host = ExpertHost(
                peer,
                plan,
                run_id,
                lifetime,
                wanted=serve_experts,
                folder=Path(expert_folder),
                name=name,
                save_seconds=expert_save_seconds,
                device=device,
            )
        self.directory = ExpertDirectory(peer, plan, run_id, lifetime, self.host.experts if self.host else {})

    def stop(self) -> None:
        """Say goodbye and save. Takes some seconds if experts are served here."""
        self.directory.stop()
        if self.host:
            self.host.stop()


def refuse_what_experts_cannot(plan: ExpertPlan | None, serve_experts: int, gradient_checkpointing: bool) -> None:
    """Refuse a volunteer's options that do not go with the run.

    :param plan: the run's; None if it has no experts.
    :raises UserError: it names the option.
    """
    if plan is None and serve_experts:
        raise UserError(
            "This run has no experts to serve: its task is another one than moe_mlm. Leave out --serve_experts."
        )
    if plan is not None and gradient_checkpointing:
        raise UserError(
            "With --gradient_checkpointing each layer is computed twice, and its experts would be called twice, with "
            "other answers the second time. Leave it out; a smaller --micro_batch_size takes less memory, too."
        )
