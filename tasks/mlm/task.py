"""Masked language modelling, with sentence order where the model judges it, as ALBERT is trained (Lan et al. 2019)."""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from collab.errors import UserError
from tasks.mlm.architecture import (
    SPECIAL_IDS,
    WITH_ORDER,
    knows_segments,
    make_config,
    make_model,
    read_config,
    refuse_too_long,
    special_ids,
)
from tasks.mlm.batches import BatchStream, Shape, Texts
from tasks.mlm.cleaning import make_cleaner
from tasks.mlm.encoder import open_encoder
from tasks.mlm.first_weights import FILE as FIRST_WEIGHTS
from tasks.mlm.first_weights import FirstWeights, StartModel
from tasks.mlm.heads import MaskedPositions, fuse_activations
from tasks.mlm.heldout import held_out_batches
from tasks.mlm.instances import NO_ORDER
from tasks.mlm.masking import IGNORED
from tasks.mlm.sources import Source, documents
from tokenizer.train import train_tokenizer

logger = logging.getLogger(__name__)
disable_progress_bar()  # the bar of `save_pretrained` would draw over the console line of the run

_KEEP_OUT = "Leave it out, and you get the run's own; or start a run of your own without --initial_peers."


class MaskedLM:
    """The masked LM task. See `tasks.Task` for what each method is for."""

    first_weights: Literal["everywhere", "here", "elsewhere"] = "everywhere"

    def __init__(self, settings: Mapping[str, Any], folder: Path, cache_dir: Path) -> None:
        self.settings, self.cache_dir = settings, cache_dir
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.encoder = open_encoder(folder)
        config = AutoConfig.from_pretrained(folder)
        # Every peer starts from the same weights, also when several start at once and none has a state to hand out.
        torch.manual_seed(settings["seed"])
        model = make_model(config)
        self.model: torch.nn.Module = model
        self._start = FirstWeights.of_run(folder)
        if self._start is not None:
            self.first_weights = "here" if self._start.load_into(model, cache_dir) else "elsewhere"
        fuse_activations(model)
        self._predict = MaskedPositions(model)
        self._inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if knows_segments(config) else [])]
        self._judges_order = config.model_type in WITH_ORDER
        self._held_out: tuple[int, list[dict[str, torch.Tensor]]] | None = None

    @staticmethod
    def prepare(settings: Mapping[str, Any], cache_dir: Path) -> dict[str, bytes]:
        name, length = _model_name(settings), settings["seq_length"]
        source = StartModel.find(settings["start_from"], cache_dir) if settings["start_from"] else None
        config = source.config() if source else read_config(Path(name))
        refuse_too_long(length, config, name)  # before a tokenizer is trained
        tokenizer = _open_tokenizer(settings, cache_dir, source)
        config |= special_ids(config, tokenizer)
        refuse_too_long(length, config, name, tokenizer.pad_token_id)
        if settings["tokenizer"] is None and source is None:
            tokenizer.model_max_length = length  # the model has seen no position beyond
        if not knows_segments(make_config(config)):
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        with tempfile.TemporaryDirectory(prefix="samiti-") as scratch:
            tokenizer.save_pretrained(scratch)
            files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir()) if path.is_file()}
            entries = len(AutoTokenizer.from_pretrained(scratch))
            if source:
                source.refuse_vocabulary(entries, settings["tokenizer"])
                files[FIRST_WEIGHTS] = source.keep(config, settings["seed"], cache_dir).as_bytes()
                Path(scratch, FIRST_WEIGHTS).write_bytes(files[FIRST_WEIGHTS])
            else:
                config["vocab_size"] = entries
            files["config.json"] = json.dumps(config, indent=2, sort_keys=True).encode()
            Path(scratch, "config.json").write_bytes(files["config.json"])
            _try_once(settings, Path(scratch), cache_dir)
        return files

    @staticmethod
    def refuse_other_files(given: Mapping[str, Any], folder: Path) -> None:
        path = given.get("model_config")
        if path and Path(path).is_file() and FirstWeights.of_run(folder) is None:  # else it stands for nothing
            here, there = read_config(Path(path)), read_config(folder / "config.json")
            differing = sorted(
                key
                for key in here.keys() | there.keys()
                if key not in ("vocab_size", *SPECIAL_IDS) and here.get(key) != there.get(key)
            )
            if differing:  # the number of ALBERT's layers changes no shape: nobody would notice
                what = "; ".join(f"{key} = {here.get(key)}, but this run uses {there.get(key)}" for key in differing)
                raise UserError(f"The model in your {path} is not the run's: {what}. {_KEEP_OUT}")
        name = given.get("tokenizer")
        if name and Path(name).is_dir():
            mine, its = _identify_tokenizer(Path(name)), _identify_tokenizer(folder)
            if mine != its:
                raise UserError(f"The tokenizer in your {name} has {mine}, but this run's has {its}. {_KEEP_OUT}")

    def texts(self, place: str, state: dict[str, Any] | None = None) -> Texts:
        """The documents that a peer at this place trains on, from the beginning or from a state of theirs."""
        return documents(
            _sources(self.settings),
            seed=self.settings["seed"],
            place=place,
            part="train",
            cache_dir=self.cache_dir,
            shuffle_buffer=self.settings["shuffle_buffer"],
            state=state,
        )

    def batches(
        self,
        micro_batch_size: Callable[[], int],
        place: str,
        *,
        step: Callable[[], int],
        state: dict[str, Any] | None = None,
    ) -> BatchStream:
        settings = self.settings
        longest = settings["seq_length"]
        return BatchStream(
            partial(self.texts, place),
            self.encoder,
            clean=make_cleaner(settings["cleaning"]),
            shape=lambda: Shape(micro_batch_size() * longest, length_at(step(), settings)),
            mask_probability=settings["mask_probability"],
            parted=self._judges_order,
            seed=f"{settings['seed']} {place}",
            state=state,
        )

    def trial_batch(self, samples: int) -> dict[str, torch.Tensor]:
        shape = samples, self.settings["seq_length"]
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(len(self.encoder.ordinary_ids), shape, generator=drawn)
        ids = torch.from_numpy(self.encoder.ordinary_ids)[ids]
        chosen = torch.rand(shape, generator=drawn) < self.settings["mask_probability"]
        return {
            "input_ids": torch.where(chosen, self.encoder.mask_id, ids),
            "labels": torch.where(chosen, ids, IGNORED),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "token_type_ids": torch.zeros(shape, dtype=torch.int64),
            "sentence_order_label": torch.arange(samples) % 2,
        }

    def tokens(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batch["attention_mask"].sum())

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        """Masked tokens. By samples, tokens of short texts would count more: they share batches with their like."""
        return int((batch["labels"] >= 0).sum())

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output, logits, labels = self._restore(batch)
        total = cross_entropy(logits, labels)
        order_logits = output.get("sop_logits", output.get("seq_relationship_logits"))
        if order_logits is not None:
            order = batch["sentence_order_label"]
            losses = cross_entropy(order_logits.float(), order, ignore_index=NO_ORDER, reduction="sum")
            total = total + losses / (order != NO_ORDER).sum().clamp(min=1)  # a mean over no label would be NaN
        return total

    def _restore(self, batch: dict[str, torch.Tensor]) -> tuple[Mapping[str, Any], torch.Tensor, torch.Tensor]:
        """The model's output; of it the logits of the masked tokens, float32 [masked, entries]; what was there."""
        labels = batch["labels"].flatten()
        positions = (labels >= 0).nonzero().squeeze(1)
        output = self._predict(positions, **{name: batch[name] for name in self._inputs})
        return output, output.get("prediction_logits", output.get("logits")).float(), labels[positions]

    @torch.no_grad()
    def evaluate(self, most_batches: int, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        if self._held_out is None or self._held_out[0] != most_batches:
            batches = held_out_batches(
                self.settings, self.encoder, self.cache_dir, most=most_batches, parted=self._judges_order
            )
            self._held_out = most_batches, batches
        device, was_training = next(self.model.parameters()).device, self.model.training
        total, right, masked = 0.0, 0, 0
        self.model.eval()
        try:
            for batch in self._held_out[1]:
                if stop():
                    return {}
                _, logits, labels = self._restore({name: tensor.to(device) for name, tensor in batch.items()})
                total += float(cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
                masked += len(labels)
        finally:
            self.model.train(was_training)
        return {"held_out_loss": total / masked, "held_out_accuracy": right / masked} if masked else {}

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    def usage(self, name: str) -> str:
        return (
            "from transformers import pipeline\n\n"
            f'fill = pipeline("fill-mask", "{name}")\n'
            f'print(fill("The word that was {self.tokenizer.mask_token} here."))'
        )

    def card_metadata(self) -> dict[str, Any]:
        return {
            "library_name": "transformers",
            "pipeline_tag": "fill-mask",
            "datasets": sorted({source.hub for source in _sources(self.settings) if source.hub}),
            "base_model": self._start.repository if self._start else None,
        }

    def description(self) -> dict[str, str]:
        config = self.model.config
        parameters = sum(param.numel() for param in self.model.parameters())
        started = {"Started from": self._start.describe()} if self._start else {}
        return {
            "Model": f"{type(self.model).__name__}, {parameters / 1e6:.1f} M parameters",
            "Objective": "masked language modelling with whole-word masks"
            + ", and sentence order" * self._judges_order,
            "Vocabulary": f"a vocabulary of {config.vocab_size:,} entries",  # type: ignore[union-attr]
            **started,
            "Data": _mixture(_sources(self.settings)),
        }


def length_at(step: int, settings: Mapping[str, Any]) -> int:
    """Tokens in the longest instance at a global step: it grows linearly to `seq_length`, in steps of 8 tokens.

    Short instances are cheaper, and all that the first thousands of steps need; BERT took 128 tokens for 90 % of its
    training (Devlin et al. 2019, appendix A.2).
    """
    last, steps = settings["seq_length"], settings["seq_length_warmup_steps"]
    if step >= steps:
        return int(last)
    first = min(last, settings["seq_length_start"])
    return int(first + (last - first) * step / steps) // 8 * 8


def _try_once(settings: Mapping[str, Any], folder: Path, cache_dir: Path) -> None:
    """One small forward pass: a config that no model can be built from should not open a run."""
    try:
        task = MaskedLM(settings, folder, cache_dir)
        loss = task.loss(next(task.batches(lambda: 2, place="trial", step=lambda: 0)))
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise UserError(
            f"No masked language model can be made of {_model_name(settings)}: {reason}. Compare it with "
            f"tasks/mlm/models/albert_large.json, or give another model_config."
        ) from error
    if not loss.isfinite():
        raise UserError(
            f"The model of {_model_name(settings)} gives a loss of {loss.item()} before any training. Look at its "
            f"initializer_range and layer_norm_eps."
        )


def _sources(settings: Mapping[str, Any]) -> list[Source]:
    return [Source.from_mapping(mapping) for mapping in settings["sources"]]


def _mixture(sources: list[Source]) -> str:
    """The sources with their shares of the documents, as in "77 % the files a.txt; 23 % the embedded corpus"."""
    if len(sources) == 1:
        return sources[0].describe()
    whole = sum(source.weight for source in sources)
    return "; ".join(f"{100 * source.weight / whole:.3g} % {source.describe()}" for source in sources)


def _model_name(settings: Mapping[str, Any]) -> str:
    return str(settings["start_from"] or settings["model_config"])


def _open_tokenizer(settings: Mapping[str, Any], cache_dir: Path, source: StartModel | None) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name, or that of the model that the run starts from, or one trained from the
    run's own text, which is kept in `cache_dir`."""
    name = settings["tokenizer"] or (source and str(source.folder))
    if name is None:
        wanted = ("sources", "cleaning", "vocab_size", "tokenizer_megabytes", "normalizer", "lowercase", "seed")
        recipe = json.dumps({key: settings[key] for key in wanted}, sort_keys=True)
        folder = cache_dir / "tokenizers" / sha256(recipe.encode()).hexdigest()[:16]
        if not _opens(folder):
            logger.info("Training a tokenizer of %d entries from the run's text", settings["vocab_size"])
            texts = documents(
                _sources(settings),
                seed=settings["seed"],
                place="tokenizer",
                part="train",
                cache_dir=cache_dir,
                shuffle_buffer=settings["shuffle_buffer"],
                endless=False,
            )
            train_tokenizer(
                map(make_cleaner(settings["cleaning"]), texts),
                folder,
                vocab_size=settings["vocab_size"],
                normalizer=settings["normalizer"],
                lowercase=settings["lowercase"],
                megabytes=settings["tokenizer_megabytes"],
                seed=settings["seed"],
            )
        name = str(folder)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what comes from Rust has no type of its own
        raise UserError(
            f"The tokenizer {name!r} cannot be opened: {str(error).splitlines()[0]} Set `tokenizer` to a folder or a "
            f"name on the Hub, or leave it out to train one."
        ) from error


def _opens(folder: Path) -> bool:
    """Whether there is a tokenizer that can be used; one that was kept may be damaged."""
    if not folder.exists():
        return False
    try:
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - what comes from Rust has no type of its own
        logger.warning("The tokenizer in %s is damaged (%s): it is made again", folder, " ".join(str(error).split()))
        return False
    return True


def _identify_tokenizer(folder: Path) -> str:
    """Equal for tokenizers that do the same: their entries, and all rules of how text is cut into them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rules = json.dumps(sorted(tokenizer.get_vocab().items()))
    rules += tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    return f"{len(tokenizer):,} entries and fingerprint {sha256(rules.encode()).hexdigest()[:8]}"
