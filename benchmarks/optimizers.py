"""The optimizers on the 17.8 M parameters of ALBERT-large: CPU time of a step on one thread, and memory."""

import statistics
import time
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AlbertConfig, AlbertForPreTraining

from benchmarks.report import Report, run_benchmark
from collab.optimizer import OPTIMIZERS, weight_decay_groups

MODEL = Path(__file__).parent.parent / "tasks" / "mlm" / "models" / "albert_large.json"
REFERENCE, PLAIN = "adamw", "adamw, not fused"
KINDS = OPTIMIZERS | {PLAIN: partial(torch.optim.AdamW, fused=False)}
MEGABYTE = 10**6
BARS = {"lamb": 8.0, "lamb_8bit": 20.0, "adamw_8bit": 18.0}


def albert_large() -> torch.nn.Module:
    """With a gradient for every parameter, of sizes as they occur."""
    torch.manual_seed(0)
    model = AlbertForPreTraining(AlbertConfig.from_json_file(MODEL))
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    return model


def optimizer_of(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """With its state, and after the steps in which allocators settle."""
    optimizer = KINDS[kind](weight_decay_groups(model, 0.01), lr=1e-4)
    for _ in range(2):
        optimizer.step()
    return optimizer


def peak_megabytes(optimizer: torch.optim.Optimizer) -> float:
    """The most that the tensors of a step take at a time, beside state, weights and gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0)) / MEGABYTE


def measure(report: Report, rounds: int) -> None:
    """In turn, so that whatever else the machine does meets all of them."""
    torch.set_num_threads(1)
    model = albert_large()
    values = sum(param.numel() for param in model.parameters())
    report.figure("parameters", values / 1e6, "M")
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    made = {kind: optimizer_of(kind, model) for kind in KINDS}
    for _ in range(rounds):
        for kind, optimizer in made.items():
            began = time.process_time()
            optimizer.step()
            seconds[kind].append(time.process_time() - began)
    for kind, optimizer in made.items():
        report.figure(f"{kind}: a step", 1000 * statistics.median(seconds[kind]), "ms CPU")
        state = sum(value.nbytes for state in optimizer.state.values() for value in state.values()) / values
        if kind.endswith("8bit"):
            report.at_most(f"{kind}: state", state, "bytes a parameter", 2.1)
        else:
            report.figure(f"{kind}: state", state, "bytes a parameter")
        report.figure(f"{kind}: beside it during a step", peak_megabytes(optimizer), "MB")
    for kind in KINDS:
        ratio = statistics.median(one / other for one, other in zip(seconds[kind], seconds[REFERENCE], strict=True))
        if kind in BARS:
            report.at_most(f"{kind}: time of torch's fused AdamW", ratio, "x", BARS[kind])
        elif kind != REFERENCE:
            report.figure(f"{kind}: time of torch's fused AdamW", ratio, "x")


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, rounds=15)
