"""What a run has agreed on about its experts: how many there are, what one is, and who serves which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from collab.metrics import MAX_EXPERTS, HostedExpert, ServerRecord, is_live

CODECS = {"none": CompressionType.NONE, "scaled_float16": CompressionType.MEANSTD_16BIT}
"""On the wire. Plain float16 is none of them: gradients of single tokens are often below its smallest number."""


class FeedForward(torch.nn.Module):
    """One expert: a feed-forward layer that adds nothing until it is trained, because its last matrix begins as zeros.

    float32 [tokens, hidden size] in and out, each token by itself.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(hidden_size, inner_size)
        self.activation = torch.nn.GELU(approximate="tanh")
        self.down = torch.nn.Linear(inner_size, hidden_size)
        torch.nn.init.zeros_(self.down.weight)
        torch.nn.init.zeros_(self.down.bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.activation(self.up(rows)))
        return out


@dataclass(frozen=True)
class ExpertPlan:
    """What all peers of a run know of its experts, from the run's settings and its model.

    :param swarm_id: keeps runs apart (`Manifest.swarm_id`).
    :param layers: mixtures in the model; each has experts of its own.
    :param experts: in each mixture.
    :param hidden_size: values of a token that go into an expert and come out.
    :param inner_size: values between its two matrices.
    :param per_token: experts that each token is sent to.
    :param least: answers for each token that are worth the whole `timeout`; those that are later than twice the time
      in which all tokens have so many are not waited for.
    :param timeout: seconds after which a call is given up.
    :param codec: a key of `CODECS`.
    :param learning_rate: of an expert's Adam, which makes a step for each batch of gradients.
    :param max_grad_norm: such a gradient is clipped to this norm; 0 leaves it alone.
    :param seed: of fresh experts' weights.
    """

    swarm_id: str
    layers: int
    experts: int
    hidden_size: int
    inner_size: int
    per_token: int = 2
    least: int = 1
    timeout: float = 5.0
    codec: str = "none"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0

    @classmethod
    def of_run(cls, settings: Mapping[str, Any], swarm_id: str, layers: int, hidden: int, inner: int) -> "ExpertPlan":
        """The plan that follows from a run's settings."""
        return cls(
            swarm_id,
            layers,
            settings["experts"],
            hidden,
            settings["expert_size"] or inner,
            per_token=settings["experts_per_token"],
            least=settings["experts_least"],
            timeout=settings["expert_timeout"],
            codec=settings["expert_compression"],
            learning_rate=settings["expert_learning_rate"],
            betas=(settings["adam_beta1"], settings["adam_beta2"]),
            epsilon=settings["adam_epsilon"],
            max_grad_norm=settings["max_grad_norm"],
            seed=settings["seed"],
        )

    @property
    def total(self) -> int:
        """Experts of the whole run; those of the layer l are numbered from l * experts on."""
        return self.layers * self.experts

    @property
    def schema(self) -> BatchTensorDescriptor:
        """Of what goes into an expert, and of what comes out: any number of rows of a constant size."""
        return BatchTensorDescriptor(self.hidden_size, dtype=torch.float32, compression=CODECS[self.codec])

    def uid(self, index: int) -> str:
        """hivemind's name of an expert."""
        return f"{self.swarm_id}_expert.{index}"

    def make(self, index: int) -> FeedForward:
        """A fresh expert: the same on every computer, and no two alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * MAX_EXPERTS + index)
            return FeedForward(self.hidden_size, self.inner_size)


def holders(records: Sequence[ServerRecord], lifetime: float, now: float | None = None) -> dict[int, ServerRecord]:
    """Who serves which expert, by the records of the live servers. Of two that claim the same the one that was first
    has it, so that everybody who sees both records comes to the same result.

    :param lifetime: seconds for which a server's word counts.
    """
    claims: dict[int, tuple[float, str, ServerRecord]] = {}
    for record in records:
        if is_live(record, lifetime, now):
            for expert in record.experts:
                claim = expert.since, record.peer_id, record
                if expert.index not in claims or claim[:2] < claims[expert.index][:2]:
                    claims[expert.index] = claim
    return {index: claims[index][2] for index in sorted(claims)}


def hosted_in(record: ServerRecord, index: int) -> HostedExpert:
    """What a server says of one of its experts."""
    found: HostedExpert = next(expert for expert in record.experts if expert.index == index)
    return found
