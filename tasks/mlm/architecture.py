"""Which models of transformers train here as masked language models, and how one is made of a config.json."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from collab.errors import UserError

WITH_ORDER = frozenset({"albert", "bert", "ernie", "megatron-bert"})
"""Model types whose `AutoModelForPreTraining` judges sentence order beside its predictions."""
WITHOUT_ORDER = frozenset({
    "camembert", "deberta", "deberta-v2", "distilbert", "modernbert", "rembert", "roberta", "roberta-prelayernorm",
    "roformer", "xlm-roberta", "xlm-roberta-xl",
})  # fmt: skip
"""Model types that learn from masked words alone. Add one here; tests/tasks/mlm/test_architecture.py tries it out."""
AFTER_PADDING = frozenset({"camembert", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"})
"""Those that number positions from pad_token_id + 1 on (fairseq's way), so that 512 tokens take 514 positions."""

SPECIAL_IDS = tuple(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep", "mask"))


def read_config(path: Path, called: str | None = None) -> dict[str, Any]:
    """Read a config.json.

    :param called: what to call it in a message, if its path would tell a person nothing
    :raises UserError: it cannot be read, or its model cannot be trained here
    """
    name = called or str(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The model config {name} cannot be read: {error.strerror}. Set model_config.") from error
    except ValueError as error:
        raise UserError(f"The model config {name} is not JSON: {error}. Mend the file.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f'{name} is no model config: it needs at least "model_type", for example "albert".')
    kind, trainable = str(config["model_type"]), sorted(WITH_ORDER | WITHOUT_ORDER)
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, trainable, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"These can be trained: {', '.join(trainable)}."
        raise UserError(f"{name}: transformers has no model_type {kind!r}. {hint}")
    if kind not in trainable or config.get("is_decoder"):
        what = f"a {kind} decoder" if kind in trainable else f"a model of type {kind}"
        raise UserError(
            f"{name} is {what}, which is not trained as a masked language model here: it has no head for that, or is "
            f"trained in another way (decoders, encoder-decoders, ELECTRA's discriminators). These can be trained: "
            f"{', '.join(trainable)}."
        )
    try:
        make_config(config)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is no config of a model of type {kind}: {reason}. Mend the file.") from error
    return config


def make_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of transformers with all its defaults."""
    made: PreTrainedConfig = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    return made


def auto_class(model_type: str) -> Any:
    """The class of transformers that makes and opens this model, with a head for sentence order if it has one."""
    return AutoModelForPreTraining if model_type in WITH_ORDER else AutoModelForMaskedLM


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with new weights, in float32 whatever the config says, with SDPA attention where transformers has it."""
    model: PreTrainedModel = auto_class(config.model_type).from_config(config, dtype=torch.float32)
    return model


def knows_segments(config: PreTrainedConfig) -> bool:
    """Whether the model tells a first and a second segment apart (token_type_ids)."""
    return getattr(config, "type_vocab_size", 0) > 1


def special_ids(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What the ids of special tokens in a config have to be: those of the run's tokenizer.

    Defaults are another tokenizer's. ModernBERT's pad_token_id 50283 lies outside a vocabulary of 32,000; RoBERTa
    would take the token 1 for padding, number positions by it and never train it.
    """
    made = make_config(config)
    return {name: getattr(tokenizer, name) for name in SPECIAL_IDS if name in config or hasattr(made, name)}


def refuse_too_long(seq_length: int, config: Mapping[str, Any], name: str, pad_id: int = 0) -> None:
    """Refuse instances that are longer than the model has positions.

    :param name: of the config, for the message
    :param pad_id: the tokenizer's; the first one that a model of `AFTER_PADDING` leaves out
    """
    given = getattr(make_config(config), "max_position_embeddings", seq_length)
    unused = pad_id + 1 if config["model_type"] in AFTER_PADDING else 0
    if seq_length > given - unused:
        left = f", {unused} of which it cannot use with this tokenizer" if unused else ""
        raise UserError(
            f"seq_length is {seq_length}, but the model in {name} has {given} positions{left}. Lower seq_length to "
            f"{(given - unused) // 8 * 8} or raise max_position_embeddings to {seq_length + unused}."
        )
