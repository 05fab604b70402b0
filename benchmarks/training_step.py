"""Real tokens a second of the training step: (a) as in the recipes of 2021, (b) ours without a swarm, (c) ours in one.

ALBERT with hidden size 256, 6 layers, a vocabulary of 32,000 and instances of up to 512 tokens, on one thread, once on
whole documents and once on short ones. (a) and (b) take turns in one process and are compared by CPU time; (b) and (c)
take turns as two peers each, one on each of two cores, and are compared by the clock.
"""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil
import torch
import yaml
from transformers import AlbertConfig, AlbertForPreTraining, AutoTokenizer

from arguments import agreed_settings, read_config
from benchmarks.data_pipeline import mask, pairs, up_to
from benchmarks.join import start, wait
from benchmarks.report import Report, run_benchmark
from collab.step import TrainingStep, Way, possible_ways
from collab.tuning import size_of
from scripts.local_swarm import LOOPBACK, end
from tasks.loader import Loader
from tasks.mlm.corpus import embedded_documents
from tasks.mlm.task import MaskedLM
from tokenizer.train import train_tokenizer

MODEL: dict[str, Any] = dict(
    model_type="albert", embedding_size=128, hidden_size=256, num_hidden_layers=6, num_hidden_groups=1,
    num_attention_heads=4, intermediate_size=1024, max_position_embeddings=512, hidden_act="gelu_new",
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, pad_token_id=0,
    bos_token_id=2, eos_token_id=3,
)  # fmt: skip
VOCABULARY, LENGTH = 32_000, 512
MICRO_BATCH, SAMPLES_A_STEP = 8, 96  # of one peer
MICRO_BATCH_IN_SWARM = 2  # a call of 0.6 s, as a trainer would choose: the other peer waits for it
SHORT = 300  # characters
CHARACTERS = 24_000_000
OLD_BYTES = 400_000  # of text that (a) repeats: its batches are made before the clock runs
BARS = {"short documents": (5.0, 7.5), "whole documents": (2.4, 3.7)}  # float32, bfloat16
PEERS, STEPS_OF_SWARM = 2, 4
CPU = torch.device("cpu")
JOINS = re.compile(r"--initial_peers (\S+)")
RATE = re.compile(r"step (\d+)/.*?([\d,]+) tokens/s.* peers 2/2")


@dataclass
class Loop:
    """A training loop that can be stopped and taken up again."""

    turn: Callable[[], int]
    """One micro-batch; gives its real tokens."""

    def run(self, seconds: float) -> tuple[float, float]:
        """Tokens per second of CPU time and of the clock, over at least so many CPU seconds."""
        cpu, wall, tokens = time.process_time(), time.monotonic(), 0
        while time.process_time() - cpu < seconds:
            tokens += self.turn()
        return tokens / (time.process_time() - cpu), tokens / (time.monotonic() - wall)


def as_in_2021(texts: list[str], folder: Path) -> Loop:
    """transformers' model with eager attention, its own loss on all positions, padding to 512, torch's AdamW."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {**MODEL, "vocab_size": len(tokenizer), "attn_implementation": "eager"}
    config = AlbertConfig(**options)
    model = AlbertForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    order = random.Random(0)
    columns = pairs(up_to(texts, OLD_BYTES), tokenizer, order)
    rows = [{name: column[row] for name, column in columns.items()} for row in range(len(columns["input_ids"]))]
    batches = []
    for at in range(0, len(rows) - MICRO_BATCH, MICRO_BATCH):
        some = rows[at : at + MICRO_BATCH]
        more = {key: torch.tensor([row[key] for row in some]) for key in ("token_type_ids", "sentence_order_label")}
        batches.append({**mask(some, tokenizer, order), **more})
    accumulated = 0

    def turns() -> Iterator[int]:
        nonlocal accumulated
        while True:
            for batch in batches:
                model(**batch).loss.backward()
                accumulated += MICRO_BATCH
                if accumulated >= SAMPLES_A_STEP:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    accumulated = 0
                yield int(batch["attention_mask"].sum())

    return Loop(turns().__next__)


def ours(settings: dict[str, Any], folder: Path, ways: list[Way], micro_batch: int) -> dict[Way, Loop]:
    """Our task, loader and step in a loop without peers; one loop for each way, over the same model and text."""
    task = MaskedLM(settings, folder, folder)
    step = TrainingStep([task], [CPU], ways[0])
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-4, fused=True)
    for param in task.model.parameters():
        param.grad = torch.zeros_like(param)
    sums = [torch.zeros_like(param) for param in task.model.parameters()]
    batches = Loader(task.batches(lambda: micro_batch, "benchmark", step=lambda: 0))
    accumulated = weights = 0

    def turn(way: Way) -> int:
        nonlocal accumulated, weights
        if step.way != way:
            step.way = way
        batch = next(batches)
        weight = task.weight(batch)
        step(batch)
        gradients = [param.grad for param in task.model.parameters() if param.grad is not None]
        torch._foreach_add_(sums, gradients, alpha=weight)
        accumulated, weights = accumulated + size_of(batch), weights + weight
        if accumulated >= SAMPLES_A_STEP:
            for param, total in zip(task.model.parameters(), sums, strict=True):
                assert param.grad is not None
                param.grad.copy_(total.div_(weights))
                total.zero_()
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
            optimizer.step()
            accumulated = weights = 0
        return task.tokens(batch)

    return {way: Loop(partial(turn, way)) for way in ways}


def compare(report: Report, name: str, texts: list[str], config: Path, folder: Path, rounds: int, seconds: int) -> None:
    """(a) and (b) in turn."""
    settings = agreed_settings(read_config(config))
    ways = possible_ways("auto", CPU)
    old, new = as_in_2021(texts, folder), ours(settings, folder, ways, MICRO_BATCH)
    rates: dict[Way | None, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for way in (None, *ways):
            rate, _ = (new[way] if way else old).run(seconds if number else 2.0)
            if number:  # the first time a loop is slower
                rates[way].append(rate)
        say(f"{name}: round {number} of {rounds}")
    medians = {way: statistics.median(each) for way, each in rates.items()}
    say(f"{name}: " + ", ".join(f"{way or '(a)'} {rate:,.0f} tokens per CPU s" for way, rate in medians.items()))
    report.figure(f"{name}: (a) as in 2021", medians[None], "tokens per CPU s")
    for precision, bar in zip((torch.float32, torch.bfloat16), BARS[name], strict=True):
        best = max((way for way in ways if way.precision == precision), key=lambda way: medians[way], default=None)
        if best is not None:
            report.figure(f"{name}: (b) ours, {best}", medians[best], "tokens per CPU s")
            report.at_least("  to (a)", medians[best] / medians[None], "x", bar)


# ---- in a swarm


def plain_peer(core: int, config: Path, folder: Path, seconds: int, result: Any) -> None:
    """(b) in a process of its own, pinned to a core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    loop = ours(agreed_settings(read_config(config)), folder, [Way()], MICRO_BATCH_IN_SWARM)[Way()]
    loop.run(5.0)
    result.put(loop.run(seconds)[1])


def without_swarm(config: Path, folder: Path, seconds: int) -> float:
    """Tokens a second of two loops at the same time."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    cores = sorted(os.sched_getaffinity(0))[:PEERS]
    peers = [context.Process(target=plain_peer, args=(core, config, folder, seconds, results)) for core in cores]
    for each in peers:
        each.start()
    rates = [results.get(timeout=seconds * 10 + 120) for _ in peers]
    for each in peers:
        each.join()
    return sum(rates)


def in_swarm(config: Path, scratch: Path) -> float:
    """Tokens a second of two trainers that average with each other; the median over steps in which both were there."""
    logs = [scratch / f"peer-{number}-{time.monotonic_ns()}.log" for number in range(PEERS)]
    own = [
        "--threads", "1", "--precision", "float32", "--micro_batch_size", str(MICRO_BATCH_IN_SWARM),
        "--host_maddrs", LOOPBACK, "--cache_dir", str(scratch / "cache"),
    ]  # fmt: skip
    peers: list[subprocess.Popen[bytes]] = []
    try:
        for core, log in zip(sorted(os.sched_getaffinity(0)), logs, strict=False):
            if peers:
                wait(lambda: JOINS.search(logs[0].read_text()) is not None, 300, f"no address; see {logs[0]}")
                found = JOINS.search(logs[0].read_text())
                assert found is not None
                how = ["--initial_peers", found[1]]
            else:
                how = ["--config", str(config)]
            peers.append(start(log, "run_trainer.py", *how, *own))
            psutil.Process(peers[-1].pid).cpu_affinity([core])
        wait(lambda: min(len(rates_in(log)) for log in logs) > STEPS_OF_SWARM, 900, f"too few steps; see {logs[0]}")
    finally:
        for peer in peers:
            peer.send_signal(signal.SIGINT)
        for peer in peers:
            end(peer)
    by_step = [rates_in(log) for log in logs]
    both = sorted(by_step[0].keys() & by_step[1].keys())[1:]  # in its first step a peer was not there from the start
    return statistics.median(by_step[0][step] + by_step[1][step] for step in both) if both else math.nan


def rates_in(log: Path) -> dict[int, float]:
    """Tokens a second by global step, of steps that were averaged."""
    return {int(step): float(rate.replace(",", "")) for step, rate in RATE.findall(log.read_text())}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(report: Report, rounds: int, seconds: int, swarms: int) -> None:
    """All of it; 15 minutes on two quiet cores."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="samiti-") as temporary:
        scratch = Path(temporary)
        texts = embedded_documents(scratch, budget=CHARACTERS)
        random.Random(0).shuffle(texts)
        short = [text[at : at + SHORT] for text in texts for at in range(0, len(text) - SHORT, SHORT)]
        train_tokenizer(texts, scratch / "tokenizer", vocab_size=VOCABULARY, megabytes=CHARACTERS / 1e6)
        (scratch / "model.json").write_text(json.dumps(MODEL))
        configs = {}
        for name, corpus in {"short documents": short, "whole documents": texts}.items():
            slug = name.partition(" ")[0]
            file, configs[name] = scratch / f"{slug}.jsonl", scratch / f"{slug}.yaml"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
            settings = {
                "run_id": f"benchmark-{slug}", "model_config": str(scratch / "model.json"),
                "tokenizer": str(scratch / "tokenizer"), "sources": [{"files": str(file)}], "seq_length": LENGTH,
                "shuffle_buffer": 2000, "optimizer": "adamw", "learning_rate": 1e-4, "warmup_steps": 1,
                "target_batch_size": PEERS * SAMPLES_A_STEP, "matchmaking_time": 5.0,
            }  # fmt: skip
            configs[name].write_text(yaml.safe_dump(settings))
            folder = scratch / f"files-{slug}"
            folder.mkdir()
            for path, content in MaskedLM.prepare(agreed_settings(settings), scratch / "cache").items():
                (folder / path).write_bytes(content)
            compare(report, name, corpus, configs[name], folder, rounds, seconds)
        if not swarms or len(os.sched_getaffinity(0)) < PEERS:
            say("(c), which needs two cores: NOT MEASURED")
            return
        alone, together = [], []
        for number in range(swarms):
            alone.append(without_swarm(configs[name], folder, 3 * seconds))
            together.append(in_swarm(configs[name], scratch))
            say(f"swarm {number + 1} of {swarms}: {together[-1]:,.0f} tokens/s, without one {alone[-1]:,.0f}")
        alone.append(without_swarm(configs[name], folder, 3 * seconds))
        report.figure("two peers: (b) without a swarm", statistics.median(alone), "tokens/s")
        report.figure("  slowest to fastest", min(alone) / max(alone), "x")
        report.figure("two peers: (c) in a swarm", statistics.median(together), "tokens/s")
        report.at_least("  to (b)", statistics.median(together) / statistics.median(alone), "x", 0.97)


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, rounds=5, seconds=10, swarms=2)
