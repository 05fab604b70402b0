"""The checkpoints of a run on the organizer's disk: which there are, and which of them stay."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from collab.checkpoint import TRAINER_STATE, Checkpoint, load_checkpoint, load_weights_into
from collab.errors import UserError

logger = logging.getLogger(__name__)

LOSS = "held_out_loss"


class Saved(NamedTuple):
    """A checkpoint of this run on this disk."""

    step: int
    folder: Path


class Archive:
    """The folders `step-0000100` and so on below one folder. Those of other runs are left alone.

    :param folder: it need not exist yet.
    :param run: what `trainer_state.json` of this run's checkpoints says under `swarm_id`.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def place(self, step: int) -> Path:
        """Where the checkpoint of a global step is, or would be."""
        return self.folder / f"step-{step:07d}"

    def steps(self) -> dict[int, dict[str, Any]]:
        """What `trainer_state.json` says, by global step, the oldest first. What cannot be read is not listed."""
        found = {}
        for folder in self.folder.glob("step-*"):
            try:
                state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
                if state["swarm_id"] == self.run and self.place(state["global_step"]) == folder:
                    found[state["global_step"]] = state
            except (OSError, ValueError, KeyError, TypeError):
                logger.debug("%s is no checkpoint of this run", folder)
        return dict(sorted(found.items()))

    def newest(self) -> Saved | None:
        """The checkpoint of the latest global step."""
        step = max(self.steps(), default=None)
        return None if step is None else Saved(step, self.place(step))

    def open_newest(self, model: torch.nn.Module) -> Checkpoint | None:
        """Fill the model with the newest checkpoint that can be read; gives what else is in it.

        So that the state of a run does not go with the last trainer that leaves.
        """
        for step in reversed(self.steps()):
            try:
                found = load_checkpoint(self.place(step))
                load_weights_into(model, found.folder)
                return found
            except UserError as error:
                logger.warning("%s Taking an older one.", error)
        return None

    def mend(self) -> None:
        """Remove what a process that was killed in the middle of writing has left.

        Call it before anything is written. A folder that was on its way to be replaced comes back if nothing stands in
        its place.
        """
        for old in self.folder.glob(".step-*.old"):
            place = self.folder / old.name[1:].split(".")[0]
            if not place.exists():
                old.rename(place)
        for leftover in (*self.folder.glob(".step-*.old"), *self.folder.glob(".step-*.partial")):
            shutil.rmtree(leftover, ignore_errors=True)

    def prune(self, last: int, every: int, best: int) -> list[int]:
        """Remove all checkpoints of this run but those that any of three rules keeps; gives their global steps.

        :param last: so many of the newest; at least 1.
        :param every: those whose global step is a multiple of it; 0: the rule keeps none.
        :param best: so many with the smallest held-out loss; those that were not measured do not count.
        """
        steps = self.steps()
        measured = [step for step, state in steps.items() if isinstance(state.get(LOSS), int | float)]
        kept = set(list(steps)[-last:])
        kept |= {step for step in steps if every and step % every == 0}
        kept |= set(sorted(measured, key=lambda step: steps[step][LOSS])[:best])
        gone = [step for step in steps if step not in kept]
        for step in gone:
            shutil.rmtree(self.place(step))
        return gone
