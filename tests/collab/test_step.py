"""Every way to compute the passes gives the gradient of the plain one."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForPreTraining

from collab import step as step_module
from collab.errors import UserError
from collab.step import TrainingStep, Way, checkpoint_layers, possible_ways
from collab.tuning import Batch, unless_out_of_memory

CPU = torch.device("cpu")
PLAIN = Way()


class Small:
    """A small ALBERT or BERT, as a task has it."""

    def __init__(self, model_type: str = "albert", dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        config: dict[str, Any] = dict(
            vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=40, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            classifier_dropout_prob=0.0,
        )  # fmt: skip
        more = {"embedding_size": 16} if model_type == "albert" else {}
        self.model: torch.nn.Module = AutoModelForPreTraining.from_config(
            AutoConfig.for_model(model_type, **config, **more)
        )

    def loss(self, batch: Batch) -> torch.Tensor:
        output = self.model(input_ids=batch["ids"], attention_mask=batch["mask"])
        return cross_entropy(output.prediction_logits.float().flatten(0, 1), batch["labels"].flatten())


def batch(samples: int = 4) -> Batch:
    drawn = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(5, 99, (samples, 16), generator=drawn) for _ in range(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"ids": ids, "labels": labels, "mask": mask}


def gradient(task: Small) -> torch.Tensor:
    grads = [param.grad for param in task.model.parameters() if param.grad is not None]
    return torch.cat([grad.flatten() for grad in grads])


def plain(samples: int = 4, model_type: str = "albert") -> tuple[float, torch.Tensor]:
    task = Small(model_type)
    loss = task.loss(batch(samples))
    loss.backward()
    return loss.item(), gradient(task)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("way", "tolerance"),
    [
        (PLAIN, 1e-6),
        (Way(fused_attention=False), 1e-5),
        (Way(torch.bfloat16), 0.03),
        (Way(torch.bfloat16, fused_attention=False), 0.03),
        (Way(torch.float16), 0.01),
    ],
    ids=str,
)
def test_a_way_gives_the_plain_loss_and_gradient(way, tolerance):
    loss, expected = plain()
    task = Small()
    step = TrainingStep([task], [CPU], way)
    for _ in range(2):  # nothing is left over from the first time
        passes = step(batch())
        assert passes.finite
        assert passes.loss == pytest.approx(loss, rel=tolerance)
        assert distance(gradient(task), expected) < tolerance


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_several_devices_give_the_gradient_of_one(devices):
    """Samples count alike, whichever device they are computed on; 8 devices have only 5 samples to share."""
    loss, expected = plain(samples=5)
    tasks = [Small() for _ in range(devices)]
    with torch.no_grad():
        for task in tasks[1:]:  # weights change between micro-batches, and only the first model is trained
            for param in task.model.parameters():
                param.add_(1.0)
    step = TrainingStep(tasks, [CPU] * devices, PLAIN)
    for _ in range(2):
        passes = step(batch(5))
        assert passes.loss == pytest.approx(loss, rel=1e-5)
        assert distance(gradient(tasks[0]), expected) < 1e-5


@pytest.mark.parametrize("model_type", ["albert", "bert"])
def test_checkpointed_layers_give_the_same_gradient_and_keep_less(model_type):
    loss, expected = plain(model_type=model_type)

    def saved(task: Small) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert task.loss(batch()).item() == pytest.approx(loss, rel=1e-6)
        return sum(sizes.values())

    task, names = Small(model_type), list(Small(model_type).model.state_dict())
    before = saved(task)
    checkpoint_layers(task.model)
    assert saved(task) < 0.7 * before
    assert list(task.model.state_dict()) == names
    TrainingStep([task], [CPU], PLAIN)(batch())
    assert distance(gradient(task), expected) < 1e-6


def test_checkpointed_layers_draw_the_same_dropout_again():
    results = []
    for checkpointed in (False, True):
        task = Small("bert", dropout=0.3)
        if checkpointed:
            checkpoint_layers(task.model)
        torch.manual_seed(5)
        TrainingStep([task], [CPU], PLAIN)(batch())
        results.append(gradient(task))
    assert distance(results[1], results[0]) < 1e-6


def test_a_model_without_layers_cannot_be_checkpointed():
    with pytest.raises(UserError, match="--gradient_checkpointing"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_a_gradient_that_is_not_finite_is_told():
    task = Small()
    step = TrainingStep([task], [CPU], PLAIN)
    weight = task.model.get_parameter("albert.encoder.embedding_hidden_mapping_in.weight")
    good = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.nan
    assert not step(batch()).finite
    with torch.no_grad():
        weight.copy_(good)
    assert step(batch()).finite


def test_the_scale_of_float16_adapts_to_an_overflow():
    """A loss so large that it overflows when scaled is computed with less scale the next times."""

    class Steep(Small):
        def loss(self, batch: Batch) -> torch.Tensor:
            return super().loss(batch) * 100.0

    step = TrainingStep([Steep()], [CPU], Way(torch.float16))
    finite = [step(batch()).finite for _ in range(20)]
    assert not finite[0] and finite[-1]


def test_memory_that_runs_out_on_one_of_two_devices_is_told():
    class Full(Small):
        def loss(self, batch: Batch) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    step = TrainingStep([Small(), Full()], [CPU, CPU], PLAIN)
    assert unless_out_of_memory(step, batch()) is None


# ---- which way -----------------------------------------------------------------------------------------------------


def seconds_of(monkeypatch: pytest.MonkeyPatch, step: TrainingStep, seconds: dict[Way, float]) -> None:
    monkeypatch.setattr(step, "_seconds", lambda batch: seconds[step.way])


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [((1.0, 0.5), 1), ((1.0, 2.0), 0), ((1.0, 0.97), 0), ((1.0, math.inf), 0), ((math.inf, 1.0), 1)],
)
def test_the_fastest_way_is_taken_if_it_clearly_gains(monkeypatch, seconds, taken):
    ways = [PLAIN, Way(torch.bfloat16)]
    step = TrainingStep([Small()], [CPU], PLAIN)
    seconds_of(monkeypatch, step, dict(zip(ways, seconds, strict=True)))
    told = step.choose_way(ways, batch())
    assert step.way == ways[taken] and str(ways[taken]) in told


def test_choosing_leaves_no_trace():
    task = Small(dropout=0.1)
    step = TrainingStep([task], [CPU], PLAIN)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    step.choose_way([PLAIN, Way(torch.bfloat16)], batch())
    assert torch.equal(torch.rand(3), expected)
    assert all(param.grad is None or not param.grad.any() for param in task.model.parameters())


@pytest.mark.parametrize(("after", "kept"), [(0.5, True), (0.95, False), (2.0, False)])
def test_a_compiled_step_is_kept_if_it_gains(monkeypatch, after, kept):
    step = TrainingStep([Small()], [CPU], PLAIN)
    seconds_of(monkeypatch, step, {PLAIN: 1.0, Way(compiled=True): after})
    told = step.try_compiled(batch())
    assert step.way.compiled is kept and ("not kept" in told) is not kept


def test_a_computer_without_a_compiler_trains_on(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler was found\nmore")

    step = TrainingStep([Small()], [CPU], PLAIN)
    monkeypatch.setattr(step, "_compiled", [fail])
    told = step.try_compiled(batch())
    assert step.way == PLAIN and "no C++ compiler was found" in told and "\n" not in told
    assert step(batch()).finite


def test_a_cpu_tries_bfloat16_only_where_it_has_it(monkeypatch):
    monkeypatch.setattr(step_module, "_has_bfloat16", lambda: False)
    assert possible_ways("auto", CPU) == [PLAIN]
    monkeypatch.setattr(step_module, "_has_bfloat16", lambda: True)
    tried = possible_ways("auto", CPU)
    assert tried[0] == PLAIN and {way.precision for way in tried} == {torch.float32, torch.bfloat16}
    assert possible_ways("auto", CPU, ["float32", "float16"]) == [PLAIN]
    assert {way.precision for way in possible_ways("auto", CPU, ["bfloat16"])} == {torch.bfloat16}
    assert possible_ways("float32", CPU) == [PLAIN]


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_has_one_way_by_its_capability(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert possible_ways("auto", torch.device("cuda", 0)) == [Way(precision)]
