"""What programs have kept on disk is damaged: they use what is older or begin anew, or end with one clear message."""

import signal
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
    auxiliary.wait_for_output("held out loss", times=3)
    kill(auxiliary, trainer)
    *_, sound, older, newest = sorted((run / "checkpoints").glob("step-*"))
    files = [*newest.iterdir(), *(run / name for name in OF_AUXILIARY), *(run / "trackio").glob("*.db")]
    files += [*run.glob("wandb/*/*.wandb"), *home.glob("runs/*/*.json"), *home.glob("tokenizers/*/*.json")]
    files += [file for pattern in OF_TRAINER for file in cache.glob(pattern)]
    for file in files:
        cut(file)
    flip(older / "optimizer.safetensors")
    auxiliary, trainer = start()
    step = int(sound.name.removeprefix("step-"))
    assert f"Holds the state of global step {step}, from" in auxiliary.output(), auxiliary.output()
    assert "NEW run" not in auxiliary.output()
    trainer.wait_for_output(f"Starting from global step {step}\n", timeout=90)
    auxiliary.wait_for_output("held out loss", timeout=90)
    for program in (auxiliary, trainer):
        assert "Traceback" not in program.output() and "failed" not in program.output(), program.output()
    kill(auxiliary, trainer)

    cut(run / "identity.key")
    (run / "join.txt").unlink()
    nobody = swarm.start("nobody", "run_aux_peer.py", "--config", str(config), "--run_folder", str(run))
    assert nobody.wait() == 1
    assert "identity.key is not an identity file" in nobody.output() and "Traceback" not in nobody.output()
    price(
        "every kept file cut, and a bit flipped in the checkpoint before",
        global_steps=int(newest.name.removeprefix("step-")) - step,
    )
