"""What programs have kept on disk is damaged: they use what is older or begin anew, or end with one clear message."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.prices import Price
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program

pytestmark = pytest.mark.chaos

OF_AUXILIARY = ("manifest.bin", "metrics.jsonl", "contributions.json", "peers.txt", "wandb-run-id.txt")
OF_TRAINER = ("embedded_corpus.json", "places/*/*.json", "runs/*/manifest.bin", "runs/*/*.json")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x80  # no text is left whole by this one, and no number
    file.write_bytes(content)


def saved(auxiliary: Program) -> list[int]:
    return [int(step) for step in re.findall(r"Saved the state of global step (\d+)", auxiliary.output())]


def test_damaged_files_cost_what_was_in_them(swarm: Swarm, price: Price) -> None:
    swarm.environment = {"WANDB_MODE": "offline"}
    config = swarm.configure(
        max_global_steps=1000, target_batch_size=1024, save_every=2, report_to=["trackio", "wandb"]
    )
    run, home, cache = swarm.folder / "run", swarm.new_cache("home"), swarm.new_cache("cache")

    def start() -> tuple[Program, Program]:
        auxiliary, address = swarm.start_auxiliary(config, "--cache_dir", str(home), "--keep_last", "3")
        return auxiliary, swarm.start_trainer("trainer", address, "--cache_dir", str(cache))

    def kill(*programs: Program) -> None:
        for program in programs:
            program.interrupt(signal.SIGKILL)
            program.wait()

    auxiliary, trainer = start()
    auxiliary.wait_for_output("held out loss", timeout=120, times=2)
    kill(auxiliary, trainer)
    lost = 0
    damages: list[Callable[[Path], None]] = [cut, flip]
    for damage in damages:
        *_, older, newest = sorted((run / "checkpoints").glob("step-*"))
        files = [*newest.iterdir()] if damage is cut else [newest / "optimizer.safetensors"]
        files += [run / name for name in OF_AUXILIARY] + [*(run / "trackio").glob("*.db")]
        files += [*run.glob("wandb/*/*.wandb"), *home.glob("runs/*/*.json")]
        files += [file for pattern in OF_TRAINER for file in cache.glob(pattern)]
        files += home.glob("tokenizers/*/*.json") if damage is cut else []
        for file in files:
            damage(file)
        auxiliary, trainer = start()
        step = int(older.name.removeprefix("step-"))
        assert f"Holds the state of global step {step}, from" in auxiliary.output(), auxiliary.output()
        assert "NEW run" not in auxiliary.output()
        trainer.wait_for_output(f"Starting from global step {step}\n", timeout=90)
        lost = max(lost, int(newest.name.removeprefix("step-")) - step)
        auxiliary.wait_for_output("held out loss", timeout=90)
        for program in (auxiliary, trainer):
            assert "Traceback" not in program.output() and "failed" not in program.output(), program.output()
        kill(auxiliary, trainer)
        shutil.rmtree(newest, ignore_errors=True)

    cut(run / "identity.key")
    (run / "join.txt").unlink()
    nobody = swarm.start("nobody", "run_aux_peer.py", "--config", str(config), "--run_folder", str(run))
    assert nobody.wait(60) == 1
    assert "identity.key is not an identity file" in nobody.output() and "Traceback" not in nobody.output()
    price("files of every program cut, and bits flipped in them", global_steps=lost)
