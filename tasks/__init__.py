"""What is trained: the Task protocol, and the registry that finds a task by its name."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from collab.errors import UserError
from collab.experts.mixture import Experts
from collab.experts.plan import ExpertPlan

Batch = dict[str, torch.Tensor]
"""The first dimension of each tensor is that of the samples."""

TASKS = {
    "mlm": "tasks.mlm.task:MaskedLM",
    "image_classification": "tasks.image_classification.task:ImageClassification",
    "moe_mlm": "tasks.moe_mlm.task:MoEMaskedLM",
}
"""Name in a run's YAML: where its class is. A new task is one folder, one line here, and its own arguments in
arguments.py."""


class Batches(Protocol):
    """An endless stream of micro-batches that can be taken up again."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands. JSON, some kB."""

    def close(self) -> None:
        """End; also a waiting for the next batch that goes on in another thread."""


class Task(Protocol):
    """One thing to train. The programs use nothing of a task but this.

    A task is built on every peer from the run's settings and from small files that are the same for all peers, so that
    each peer has the same first weights, the same tokenizer and the same way to make samples.
    """

    model: torch.nn.Module
    settings: Mapping[str, Any]
    """The agreed arguments. The organizer can change some while the run goes on; `batches` is called anew then."""

    first_weights: Literal["everywhere", "here", "elsewhere"]
    """Who has the weights that the run begins with: every peer, because they follow from the seed; this peer, which
    hands them to the others; or only others, so that this peer takes over their state before it trains."""

    @staticmethod
    def prepare(settings: Mapping[str, Any], cache_dir: Path) -> dict[str, bytes]:
        """Make the files that all peers share, for example a tokenizer. Runs once, at the peer that starts the run.

        :param settings: the agreed arguments.
        :param cache_dir: for intermediate results that are worth keeping on this machine.
        :returns: {relative file name: content}, a few MB at most: every newcomer downloads them.
        """

    @staticmethod
    def refuse_other_files(given: Mapping[str, Any], folder: Path) -> None:
        """Refuse a volunteer's own files that are not the run's: a path may be the same, and its content another.

        :param given: the arguments that the volunteer gave; without them there is nothing to compare.
        :param folder: holds the run's files, which `prepare` returned at the peer that started it.
        :raises UserError: it names what differs.
        """

    def __init__(self, settings: Mapping[str, Any], folder: Path, cache_dir: Path) -> None:
        """Build the model with its first weights.

        :param folder: holds the files that `prepare` returned.
        """

    def batches(
        self,
        micro_batch_size: Callable[[], int],
        place: str,
        *,
        step: Callable[[], int],
        state: dict[str, Any] | None = None,
    ) -> Batches:
        """An endless stream of micro-batches.

        :param micro_batch_size: how much goes into the next one, in samples of the greatest size that the run has; if
          samples are smaller, there are more of them in it. Asked for each batch, because it may change.
        :param place: where in the data this peer is: peers with different places see different samples.
        :param step: the swarm's global step, for what changes as training goes on.
        :param state: of an earlier stream at this place, to go on where it was.
        """

    def trial_batch(self, samples: int) -> Batch:
        """So many samples of the greatest size, with made-up content: time and memory measured on it hold for all."""

    def tokens(self, batch: Batch) -> int:
        """The tokens (or whatever samples are made of) in a batch on the CPU, padding left out: what speed counts."""

    def weight(self, batch: Batch) -> int:
        """Over how many predictions the loss of a batch is a mean: so much it counts among other batches."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss to minimise, a scalar: the mean over all predictions. `batch` is on the model's device."""

    def evaluate(self, most_batches: int, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """How good the model is now on data that nobody trains on, always the same: figures by name.

        `held_out_loss`, in nats, the lower the better, is one of them where there is such data; checkpoints are chosen
        by it. The model may be on any device; it is left in the mode (training or not) in which it was.

        :param most_batches: how much data: the time that it takes grows with it.
        :param stop: asked between batches; if it says so, there are no figures.
        :raises UserError: the data cannot be read now.
        """

    def save_pretrained(self, folder: Path) -> None:
        """Write the model, and what is needed to use it, such that plain transformers opens `folder`."""

    def usage(self, name: str) -> str:
        """Python that opens the model `name` (a folder, or a name on the Hub) and uses it; for the model card."""

    def card_metadata(self) -> dict[str, Any]:
        """What the Hub reads in a model card: pipeline_tag, datasets, base_model; None for what there is not."""

    def description(self) -> dict[str, str]:
        """What the model card and the page say about it: {heading: text}."""


@runtime_checkable
class TaskWithExperts(Protocol):
    """What a task has beside, if parts of its model live on other peers (`collab.experts`)."""

    @staticmethod
    def expert_plan(settings: Mapping[str, Any], folder: Path, swarm_id: str) -> ExpertPlan:
        """What its experts are, for who serves them.

        :param folder: holds the files that `prepare` returned.
        :param swarm_id: the run's (`Manifest.swarm_id`).
        :raises UserError: its model cannot have any.
        """

    def use_experts(self, experts: Experts) -> None:
        """Call these from now on. Before, there are none, so that trying out a device trains nobody's experts."""


def expert_plan(settings: Mapping[str, Any], folder: Path, swarm_id: str) -> ExpertPlan | None:
    """What the experts of a run are; None if its task has none. The arguments are those of `TaskWithExperts`."""
    task = find_task(settings["task"])
    return task.expert_plan(settings, folder, swarm_id) if hasattr(task, "expert_plan") else None


def find_task(name: str) -> type[Task]:
    """The class of the task called `name`. :raises UserError: there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"There is no task {name!r}.{hint} There are: {', '.join(TASKS)}. Set `task` to one of them.")
    module, _, cls = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), cls)
    return found
