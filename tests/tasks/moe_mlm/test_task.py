"""The masked LM task with experts: what it is without them, with them, and which settings it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from arguments import agreed_settings, read_config
from collab.checkpoint import load_weights_into
from collab.errors import UserError
from collab.experts.server import TrainedExpert
from tasks import TaskWithExperts, expert_plan, find_task
from tasks.mlm.task import MaskedLM
from tasks.moe_mlm.task import MoEMaskedLM
from tests.collab.experts.conftest import Experts

GIVEN = read_config(Path("configs/moe.yaml"))


@pytest.fixture(scope="module")
def settings(tokenizer_folder: Path) -> dict[str, Any]:
    return agreed_settings(GIVEN | {"tokenizer": str(tokenizer_folder), "shuffle_buffer": 10})


@pytest.fixture(scope="module")
def folder(settings: dict[str, Any], shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, content in MoEMaskedLM.prepare(settings, shared_cache).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def task(settings: dict[str, Any], folder: Path, shared_cache: Path) -> MoEMaskedLM:
    return MoEMaskedLM(settings, folder, shared_cache)


def test_every_peer_begins_with_the_same_gates(task, settings, folder, shared_cache) -> None:
    assert find_task("moe_mlm") is MoEMaskedLM and issubclass(MoEMaskedLM, TaskWithExperts)
    other = MoEMaskedLM(settings, folder, shared_cache).model.state_dict()
    mine = task.model.state_dict()
    assert any("gate" in name for name in mine)
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


def test_without_experts_it_is_the_plain_model_and_its_checkpoint_opens_as_that(
    task, settings, folder, shared_cache, tmp_path
) -> None:
    batch = task.trial_batch(2)
    plain = MaskedLM(settings, folder, shared_cache)
    assert task.loss(batch).item() == pytest.approx(plain.loss(batch).item(), abs=1e-6)
    task.save_pretrained(tmp_path)
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    ids = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        ours, theirs = task.model.eval()(**ids)["prediction_logits"], opened(**ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    again = MoEMaskedLM(settings, folder, shared_cache)
    load_weights_into(again.model, tmp_path)  # gates and all


def test_training_teaches_the_model_its_gates_and_the_experts(task, settings, folder) -> None:
    plan = expert_plan(settings, folder, "swarm")
    assert plan is not None and (plan.total, plan.hidden_size, plan.inner_size) == (8, 128, 512)
    trained = {index: TrainedExpert(plan, index) for index in range(plan.total)}
    task.use_experts(Experts(trained))
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.003)
    batches = task.batches(lambda: 8, "here", step=lambda: 0)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = task.loss(next(batches))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    batches.close()
    assert sum(losses[-5:]) < sum(losses[:5]) - 3.0
    assert all(expert.steps > 10 for expert in trained.values()), "the balancing loss keeps all of them at work"
    steps = [expert.steps for expert in trained.values()]
    with_experts = task.evaluate(1)
    assert [expert.steps for expert in trained.values()] == steps, "an evaluation trains nobody"
    task.use_experts(Experts({}))
    assert task.evaluate(1)["held_out_loss"] != with_experts["held_out_loss"]


def test_what_cannot_have_experts_is_refused(settings, folder, shared_cache, tmp_path) -> None:
    assert expert_plan(settings | {"task": "mlm"}, folder, "swarm") is None
    with pytest.raises(UserError, match=r"float16.*precisions to \[float32, bfloat16\]"):
        MoEMaskedLM.prepare(settings | {"precisions": ["float16"]}, shared_cache)
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "bert.json").write_text(json.dumps(bert | {"intermediate_size": 64, "max_position_embeddings": 64}))
    with pytest.raises(UserError, match=r"Only ALBERT's feed-forward layers .* of the type bert"):
        MoEMaskedLM.prepare(settings | {"model_config": str(tmp_path / "bert.json")}, shared_cache)
