"""Whether what makes our step fast, or a run's batches large or late, costs anything in the model: held-out losses.

Small ALBERTs are trained on the demo's corpus, each on the same number of tokens, by one process without a swarm:

- our step (batches of one length each, predictions at the masked positions alone) beside the plain one: the same text
  padded to the full length in a random order, and transformers' own loss over all positions;
- LAMB with a target batch of 2,048 beside AdamW with 256;
- gradients one step old, which is what delayed updates make, beside fresh ones.

All of them are done for some seeds, which decide about first weights, text and masks. Runs of one seed see the same
text; what is compared are losses of one seed, and how far these ratios differ between seeds is said beside them: a bar
of 1 % means something only if that is smaller.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from torch.nn.functional import pad

from arguments import agreed_settings
from benchmarks.report import Report, run_benchmark
from collab.lamb import Lamb
from collab.optimizer import linear_schedule, weight_decay_groups
from tasks import Batch
from tasks.mlm.masking import IGNORED
from tasks.mlm.task import MaskedLM

MODEL = {
    "model_type": "albert", "architectures": ["AlbertForPreTraining"], "embedding_size": 64, "hidden_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
LENGTH, MICRO_BATCH = 32, 16
HELD_OUT_BATCHES = 16  # about 400 documents
SHUFFLED = 64  # batches of ours whose samples the plain way mixes
WARM_UP = 0.1  # of the budget
SCHEDULE_POINTS = 1000

# The best of those tried on one seed (docs/optimizers.md). The published pairs (LAMB 0.00176 at 4,096, AdamW 0.0001 at
# 256) are for models and budgets some hundred times as large.
ADAMW_RATE, LAMB_RATE = 0.004, 0.05

Loss = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """One way to train."""

    plain: bool = False
    """Padded batches in a random order, and transformers' own loss."""
    delayed: bool = False
    """Each step is made with the gradient of the one before."""
    lamb: bool = False
    target_batch: int = 256


WAYS = {
    "ours": Way(),
    "plain": Way(plain=True),
    "LAMB, 2048": Way(lamb=True, target_batch=2048),
    "delayed": Way(delayed=True),
}


def settings_of(seed: int, folder: Path) -> dict[str, Any]:
    """A run on the demo's corpus."""
    config = folder / "model.json"
    config.write_text(json.dumps(MODEL))
    given = {"run_id": "convergence", "model_config": str(config), "sources": [{"embedded": True}], "vocab_size": 2048}
    return agreed_settings(given | {"tokenizer_megabytes": 1, "seq_length": LENGTH, "seed": seed})


def rows_of(batches: Iterator[Batch], rng: np.random.Generator) -> Iterator[Batch]:
    """The samples of `batches` in a random order, each padded to the full length: batches of MICRO_BATCH."""
    padding = {"labels": IGNORED}
    while True:
        samples: list[Batch] = []
        for batch in islice(batches, SHUFFLED):
            full = {
                name: pad(tensor, (0, LENGTH - tensor.shape[1]), value=padding.get(name, 0))
                if tensor.dim() > 1
                else tensor
                for name, tensor in batch.items()
            }
            samples += [{name: tensor[row] for name, tensor in full.items()} for row in range(len(full["labels"]))]
        order = rng.permutation(len(samples))
        for at in range(0, len(order) - MICRO_BATCH + 1, MICRO_BATCH):
            chosen = [samples[index] for index in order[at : at + MICRO_BATCH]]
            yield {name: torch.stack([sample[name] for sample in chosen]) for name in chosen[0]}


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """As transformers computes it: predictions at all positions, those without a label left out of the mean."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def train(task: MaskedLM, way: Way, budget: int) -> None:
    """Train the task's model on `budget` real tokens, or some more to fill a micro-batch. Steps are as in a swarm."""
    ours: Iterator[Batch] = task.batches(lambda: MICRO_BATCH, "benchmark", step=lambda: 10**9)
    seed = task.settings["seed"]
    batches = rows_of(ours, np.random.default_rng(seed)) if way.plain else ours
    loss: Loss = partial(plain_loss, task.model) if way.plain else task.loss
    params = list(task.model.parameters())
    groups = weight_decay_groups(task.model, 0.01)
    rate = LAMB_RATE if way.lamb else ADAMW_RATE
    optimizer: torch.optim.Optimizer = (Lamb if way.lamb else torch.optim.AdamW)(groups, lr=rate, eps=1e-6)
    factor = linear_schedule(int(WARM_UP * SCHEDULE_POINTS), SCHEDULE_POINTS, 0.0)
    left, held = budget, None
    while left > 0:
        samples, before, total = 0, left, 0
        optimizer.zero_grad()
        while samples < way.target_batch and left > 0:
            batch = next(batches)
            size, tokens = len(batch["labels"]), int(batch["attention_mask"].sum())
            weight = size if way.plain else task.weight(batch)
            (loss(batch) * weight).backward()
            total += weight
            samples, left = samples + size, left - tokens
        for param in params:
            if param.grad is not None:
                param.grad /= total
        if way.delayed:
            fresh = [param.grad for param in params]
            if held is not None:
                for param, gradient in zip(params, held, strict=True):
                    param.grad = gradient
            held, skip = fresh, held is None
            if skip:
                continue
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        middle = 1.0 - (before + max(0, left)) / (2 * budget)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(int(SCHEDULE_POINTS * middle))
        optimizer.step()


def held_out_loss_of(way: str, seed: int, tokens: int, folder: Path, cache_dir: Path) -> float:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    task = MaskedLM(settings_of(seed, folder), folder, cache_dir)
    train(task, WAYS[way], tokens)
    return task.evaluate(HELD_OUT_BATCHES)["held_out_loss"]


def add_rows(report: Report, losses: dict[str, list[float]]) -> None:
    """What the losses of all ways and seeds say."""
    for name, each in losses.items():
        report.figure(f"{name}: held-out loss", statistics.mean(each), "nats")
    pairs = {
        "ours to plain": ("ours", "plain", 1.01),
        "LAMB at 2048 to AdamW at 256": ("LAMB, 2048", "ours", None),
        "gradients one step old to fresh ones": ("delayed", "ours", None),
    }
    for title, (one, other, bar) in pairs.items():
        ratios = [a / b for a, b in zip(losses[one], losses[other], strict=True)]
        ratio = statistics.mean(ratios)
        if bar is None:
            report.figure(title, ratio, "x")
        else:
            report.at_most(title, ratio, "x", bar)
        spread = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        report.figure("  standard error over seeds", spread, "x")


def measure(report: Report, tokens: int, seeds: int) -> None:
    """All runs, each in a process with one thread, as many at once as there are cores."""
    losses: dict[str, list[float]] = {name: [math.nan] * seeds for name in WAYS}
    runs = [(name, seed) for seed in range(seeds) for name in sorted(WAYS, key="plain".__eq__, reverse=True)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="samiti-") as scratch:
        cache_dir, folder = Path(scratch, "cache"), Path(scratch, "run")
        folder.mkdir()
        for name, content in MaskedLM.prepare(settings_of(0, folder), cache_dir).items():
            (folder / name).write_bytes(content)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
            started = {pool.submit(held_out_loss_of, *run, tokens, folder, cache_dir): run for run in runs}
            for done, finished in enumerate(as_completed(started), start=1):
                name, seed = started[finished]
                losses[name][seed] = finished.result()
                minutes = (time.monotonic() - began) / 60
                print(
                    f"{done} of {len(runs)}: {name}, seed {seed}: {losses[name][seed]:.4f} nats; "
                    f"about {minutes * (len(runs) / done - 1):.1f} of {minutes * len(runs) / done:.1f} minutes left",
                    file=sys.stderr,
                )
    add_rows(report, losses)


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, tokens=2_000_000, seeds=3)
