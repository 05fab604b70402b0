"""A layer whose experts are elsewhere: each token goes to those that its gate likes best, on whatever peer they are."""

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hivemind.moe.client.expert import DUMMY
from torch.autograd.function import once_differentiable

from collab.experts.plan import ExpertPlan

MOST_ROWS = 4096  # in one request: longer ones go in parts
SHORTEST_PATIENCE = 0.25  # seconds


class Expert(Protocol):
    """One expert, here or elsewhere."""

    @property
    def is_near(self) -> bool:
        """Whether it is in this process: its work is done by who calls it."""

    def submit(self, *tensors: torch.Tensor) -> "Future[torch.Tensor]":
        """Ask for outputs (given rows) or for the gradient of rows (given rows and gradients of the outputs), which
        also trains it.

        :param tensors: float32 [rows, hidden size] on the CPU.
        """


class Experts(Protocol):
    """Who knows which experts there are now."""

    def alive(self) -> Mapping[int, Expert]:
        """By their number in the run."""

    def failed(self, expert: Expert, reason: str) -> None:
        """It has not answered, or not as it should: `alive` leaves it out until it is well."""


@dataclass
class _Call:
    """One request to one expert."""

    column: int
    """The expert's number in its layer."""
    expert: Expert
    rows: torch.Tensor
    """int64 [rows]: which tokens."""
    answered: bool = False


class Mixture(torch.nn.Module):
    """Sends each token to its best experts and sums up what they answer, weighted by the gate (Shazeer et al. 2017).

    Tokens are routed one by one, and each expert gets all of its tokens in one request (hivemind's
    RemoteMixtureOfExperts sends one for each sample and expert: ten times slower). A token's weights are those of the
    experts that answered, and sum up to 1; a token that nobody answered gets zeros (hivemind's gets NaN). Before
    `experts` is set there are none: the layer gives zeros.

    The gate's weights are trained with the model; the experts' are trained where they are, by each backward pass.

    :param plan: the run's.
    :param layer: which of the plan's layers this is.
    """

    experts: Experts | None = None
    """Where to find experts; set once the peer has joined."""

    def __init__(self, plan: ExpertPlan, layer: int) -> None:
        super().__init__()
        self.plan, self._first = plan, layer * plan.experts
        self.gate = torch.nn.Linear(plan.hidden_size, plan.experts, bias=False)
        self.balance: list[torch.Tensor] = []
        """For each training pass since this was cleared, how unevenly tokens were sent: 1 if evenly, at most the number
        of experts (Fedus et al. 2021, equation 4). Its gradient teaches the gate to use all experts."""

    @torch.compiler.disable  # what comes from the network cannot be compiled
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden size] to the same, finite whatever the experts do."""
        there = self._there()
        if not there:
            return torch.zeros_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            flat = hidden.reshape(-1, hidden.shape[-1]).float()
            absent = torch.ones(self.plan.experts, dtype=torch.bool, device=flat.device)
            absent[list(there)] = False
            likes = self.gate(flat).masked_fill(absent, -math.inf).softmax(1)
            best, chosen = likes.topk(min(self.plan.per_token, len(there)), dim=1)
            if self.training and torch.is_grad_enabled():
                sent = torch.zeros_like(likes).scatter_(1, chosen, 1.0).mean(0) / chosen.shape[1]
                self.balance.append(len(there) * (sent * likes.mean(0)).sum())
            calls = [
                _Call(column, expert, part)
                for column, expert in there.items()
                for part in (chosen == column).any(1).nonzero().squeeze(1).split(MOST_ROWS)
                if len(part)
            ]
            outputs = _CallMany.apply(DUMMY, self, calls, len(flat), *[flat[call.rows] for call in calls])
            weights = torch.zeros_like(likes).scatter(1, chosen, best)
            answered = torch.zeros_like(weights)
            for call in calls:
                answered[call.rows, call.column] = float(call.answered)
            weights = weights * answered
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-20)
            mixed = torch.zeros_like(flat)
            for call, output in zip(calls, outputs, strict=True):
                if call.answered:
                    mixed = mixed.index_add(0, call.rows, output * weights[call.rows, call.column, None])
        return mixed.reshape(hidden.shape).to(hidden.dtype)

    def _there(self) -> dict[int, Expert]:
        """The live experts of this layer by their number in it."""
        alive = self.experts.alive() if self.experts is not None else {}
        last = self._first + self.plan.experts
        return {index - self._first: expert for index, expert in alive.items() if self._first <= index < last}

    def ask(
        self, calls: Sequence[_Call], tensors: Sequence[Sequence[torch.Tensor]], tokens: int, least: int
    ) -> list[torch.Tensor | None]:
        """Call experts in parallel; None for those that failed, which are told to `experts`.

        :param tensors: for each call, what it sends.
        :param tokens: how many there are in all.
        :param least: answers that each token should have before the slow are left behind; 0: all are waited for.
        """
        assert self.experts is not None
        began = time.monotonic()
        answers: list[torch.Tensor | None] = [None] * len(calls)
        # who is near computes now, while the others are on their way
        order = sorted(range(len(calls)), key=lambda number: calls[number].expert.is_near)
        pending = {calls[number].expert.submit(*tensors[number]): number for number in order}
        missing = torch.zeros(tokens, dtype=torch.int64)
        for call in calls:
            missing.index_add_(0, call.rows.cpu(), torch.ones(len(call.rows), dtype=torch.int64))
        missing.clamp_(max=least)
        give_up = began + self.plan.timeout
        while pending:
            done, _ = wait(pending, timeout=max(0.0, give_up - time.monotonic()), return_when=FIRST_COMPLETED)
            if not done:
                break
            for future in done:
                number = pending.pop(future)
                call = calls[number]
                reason = _why_wrong(future, tensors[number][0])
                if reason:
                    self.experts.failed(call.expert, reason)
                else:
                    answers[number] = future.result()
                    missing[call.rows.cpu()] -= 1
            if least and int(missing.max()) <= 0:
                took = time.monotonic() - began
                give_up = min(give_up, began + 2 * max(took, SHORTEST_PATIENCE))
        for future, number in pending.items():
            future.cancel()
            self.experts.failed(calls[number].expert, f"no answer within {time.monotonic() - began:.1f} seconds")
        return answers


class _CallMany(torch.autograd.Function):
    """Both passes through many experts at once, with zeros for those that fail."""

    @staticmethod
    def forward(
        ctx: Any, dummy: torch.Tensor, mixture: Mixture, calls: list[_Call], tokens: int, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        sent = [rows.detach().cpu() for rows in inputs]
        answers = mixture.ask(calls, [(rows,) for rows in sent], tokens, mixture.plan.least)
        for call, answer in zip(calls, answers, strict=True):
            call.answered = answer is not None
        ctx.mixture, ctx.calls, ctx.tokens = mixture, calls, tokens
        ctx.save_for_backward(*sent)
        return tuple(
            torch.zeros_like(rows) if answer is None else answer.to(rows.device)
            for rows, answer in zip(inputs, answers, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mixture: Mixture = ctx.mixture
        there = mixture._there()  # one that has failed since is not asked again: it would cost a whole time limit
        asked = [n for n, call in enumerate(ctx.calls) if call.answered and there.get(call.column) is call.expert]
        sent = [(ctx.saved_tensors[n], gradients[n].contiguous().cpu()) for n in asked]
        answers = mixture.ask([ctx.calls[n] for n in asked], sent, ctx.tokens, 0)
        result = [torch.zeros_like(gradient) for gradient in gradients]
        for number, answer in zip(asked, answers, strict=True):
            if answer is not None:
                result[number] = answer.to(gradients[number].device)
        return (DUMMY, None, None, None, *result)


def _why_wrong(future: "Future[torch.Tensor]", like: torch.Tensor) -> str:
    """Why what an expert has answered cannot be used; empty if it can."""
    if future.cancelled():
        return "the call was given up"
    error = future.exception()
    if error is not None:
        return str(error).strip() or type(error).__name__
    answer = future.result()
    if answer.shape != like.shape or answer.dtype != torch.float32:
        return f"it answered {answer.dtype} {list(answer.shape)} instead of float32 {list(like.shape)}"
    return "" if bool(answer.isfinite().all()) else "its answer has NaN or infinite values"
