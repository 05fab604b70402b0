"""Predictions at the masked positions alone are those that the whole model makes there."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedModel

from tasks.mlm.heads import MaskedPositions

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
