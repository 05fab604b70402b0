"""Predictions at the masked positions alone are those that the whole model makes there."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedModel

from collab.step import TrainingStep, Way
from tasks.mlm.heads import MaskedPositions, fuse_activations

SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
    "sep_token_id": 3,
}  # fmt: skip


@pytest.fixture(params=["albert", "bert", "roberta", "deberta-v2", "modernbert"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    more = {"embedding_size": 16} if request.param == "albert" else {}
    auto = AutoModelForMaskedLM if request.param == "modernbert" else AutoModelForPreTraining
    return auto.from_config(AutoConfig.for_model(request.param, **SMALL, **more)).eval()


def inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (3, 16), generator=drawn)
    attention = torch.ones_like(ids)
    attention[1, 9:] = 0
    chosen = (torch.rand(ids.shape, generator=drawn) < 0.3) & (attention == 1)
    return {"input_ids": ids, "attention_mask": attention}, torch.where(chosen, ids.flip(0), -100)


def test_loss_and_gradients_are_those_of_the_plain_way(model):
    batch, labels = inputs()
    plain = model(**batch)
    logits = plain.get("prediction_logits", plain.get("logits"))
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    gradients = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad()

    chosen = labels >= 0
    output = MaskedPositions(model)(chosen.flatten().nonzero().squeeze(1), **batch)
    logits = output.get("prediction_logits", output.get("logits"))
    assert logits.shape == (int(chosen.sum()), 99)
    loss = cross_entropy(logits, labels[chosen])
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == {name for name, param in model.named_parameters() if param.grad is not None}
    for name, param in model.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(param.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_model_itself_stays_as_it_was(model):
    batch, labels = inputs()
    before = model(**batch)
    predict = MaskedPositions(model)
    predict((labels >= 0).flatten().nonzero().squeeze(1), **batch)
    after = model(**batch)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_the_head_is_narrowed_and_not_only_the_projection(model):
    """A dense layer and a normalisation before the projection are spared as well, where they belong to its module."""
    head = MaskedPositions._head(model)
    if model.config.model_type != "modernbert":
        assert sum(1 for _ in head.modules()) > 1


def albert(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    off = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
    more = {"embedding_size": 16, **dict.fromkeys(off, 0.0)}
    return AutoModelForPreTraining.from_config(AutoConfig.for_model("albert", **SMALL, **more))


def test_activations_in_one_operation_are_the_same_function():
    plain, fused = albert(), albert()
    fuse_activations(fused)
    assert {type(m).__name__ for m in fused.modules()} - {type(m).__name__ for m in plain.modules()} == {"GELU"}
    batch, _ = inputs()
    for name, expected in plain(**batch).items():
        found = fused(**batch)[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    sum(value.square().mean() for value in plain(**batch).values()).backward()
    sum(value.square().mean() for value in fused(**batch).values()).backward()
    for (name, found), expected in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert fused.config.hidden_act == "gelu_new"  # a checkpoint is that of the plain model


@pytest.mark.swarm  # no peers, but as slow: the compiler takes a minute
def test_a_compiled_step_gives_the_plain_gradient():
    """With masks and lengths that are other ones each time, and without compiling anew for each."""

    class Task:
        def __init__(self) -> None:
            self.model: torch.nn.Module = albert()
            self._predict = MaskedPositions(self.model)

        def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            labels = batch["labels"].flatten()
            positions = (labels >= 0).nonzero().squeeze(1)
            output = self._predict(positions, input_ids=batch["ids"], attention_mask=batch["mask"])
            return cross_entropy(output.prediction_logits, labels[positions])

    given, labels = inputs()
    batch = {"ids": given["input_ids"], "mask": given["attention_mask"], "labels": labels}
    shapes = [batch, {name: tensor[:2, :12] for name, tensor in batch.items()}]
    plain, compiled = Task(), Task()
    step = TrainingStep([compiled], [torch.device("cpu")], Way(compiled=True))
    for shape in shapes:
        plain.model.zero_grad()
        expected = plain.loss(shape)
        expected.backward()
        assert step(shape).loss == pytest.approx(expected.item(), rel=1e-5)
        for (name, found), true in zip(compiled.model.named_parameters(), plain.model.parameters(), strict=True):
            if true.grad is not None:
                torch.testing.assert_close(found.grad, true.grad, rtol=1e-3, atol=1e-6, msg=name)
