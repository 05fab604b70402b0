"""`make demo`: the first thing that a person tries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.swarm.processes import Program, assert_no_survivors

pytestmark = pytest.mark.swarm

# Runs outside of this repository, with nothing of it importable.
FILL_MASK = """
import json, sys
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, sentences = sys.argv[1], json.loads(sys.stdin.read())
model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
nats, hits, total = 0.0, 0, 0
for sentence in sentences:
    ids = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=64)["input_ids"]
    for place in range(1, ids.shape[1] - 1, 5):
        masked = ids.clone()
        masked[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(masked).logits[0, place]
        nats -= float(logits.log_softmax(-1)[ids[0, place]])
        hits += int(logits.argmax() == ids[0, place])
        total += 1
print(json.dumps({"nats": nats / total, "accuracy": hits / total, "total": total, "vocabulary": len(tokenizer)}))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """The run folder of a demo that has ended; two thirds of its steps show what there is to see."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = ["scripts/local_swarm.py", "--run_folder", str(folder), "--keep_weights", "--"]
    command += ["--cache_dir", str(shared_cache), "--max_global_steps", "32"]
    program = Program("demo", command, folder.parent / "demo.log", cold=True)
    try:
        program.wait_for_output("Others join with")
        program.wait_for_output("step    3/")
        assert program.wait(timeout=600) == 0, program.output()
    finally:
        if program.process.poll() is None:
            program.interrupt()  # killed, it would leave its peers running
            program.wait(timeout=120)
        program.end()
    assert_no_survivors(program)
    print(program.output())
    return folder


def test_the_swarm_averages_and_learns(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["peers"] == 2
    assert summary["global_steps"] >= 20
    assert summary["rounds_averaged"] >= 0.9 * summary["global_steps"]
    assert summary["rounds_alone"] == 0
    assert summary["last_loss"] <= summary["first_loss"] - 1.5
    assert summary["join_command"].startswith("python run_trainer.py --initial_peers /ip4/")
    for name in ("trainer-1", "trainer-2"):
        assert "Micro-batch of" in (demo / "logs" / f"{name}.log").read_text()


def test_both_trainers_end_with_the_same_weights(demo: Path) -> None:
    one, other = (load_file(demo / "peers" / name / "model.safetensors") for name in ("trainer-1", "trainer-2"))
    for name, tensor in one.items():
        # float16 on the wire rounds at 5e-4 of a value; the weights are of size one.
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=5e-3)
    assert any(not torch.equal(tensor, torch.zeros_like(tensor)) for tensor in one.values())


def test_the_checkpoint_opens_with_plain_transformers_and_beats_chance(
    demo: Path, shared_cache: Path, tmp_path: Path
) -> None:
    from tasks.mlm.sources import Source, documents

    embedded = [Source.from_mapping({"embedded": True})]
    heldout = documents(embedded, seed=0, place="", part="heldout", cache_dir=shared_cache, shuffle_buffer=1)
    sentences = [text[:400] for text, _ in zip(heldout, range(20), strict=False)]
    checkpoint = json.loads((demo / "summary.json").read_text())["checkpoint"]
    answer = subprocess.run(
        [sys.executable, "-I", "-c", FILL_MASK, checkpoint],
        input=json.dumps(sentences),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["total"] > 100
    assert result["accuracy"] > 10 / result["vocabulary"]
    assert result["nats"] < torch.tensor(float(result["vocabulary"])).log().item() - 0.5


def test_people_find_the_page_and_the_curves(demo: Path) -> None:
    page = (demo / "page.html").read_text()
    assert "<svg" in page and "trainer-1" in page and "trainer-2" in page
    assert len((demo / "metrics.jsonl").read_text().splitlines()) >= 20
    assert list((demo / "trackio").glob("*.db"))
