"""Continued pre-training: a run that begins with the weights of an existing model, the same ones on every peer.

The weights are too large for the run's files, which every newcomer downloads from one peer. The peer that starts the
run reads them once and keeps them in its cache; the files say which ones they are. Who has them in its cache begins
with them and hands them on; everybody else takes them over as the state of such a peer.
"""

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from collab.checkpoint import CONFIG, WEIGHTS, find_checkpoint, load_weights_into
from collab.errors import UserError
from collab.files import replacing_folder
from tasks.mlm.architecture import auto_class, make_config, read_config

FILE = "first_weights.json"
# A repository may hold weights for other libraries and an optimizer's state beside what is needed.
NEEDED = (
    CONFIG, "model*.safetensors", "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model",
)  # fmt: skip
OF_THEIR_TIME = ("dtype", "torch_dtype", "auto_map")  # in a published config: how its weights were stored and run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartModel:
    """An existing model, on this computer's disk.

    :param name: as the organizer named it: a folder, or ORG/NAME with or without @REVISION
    :param folder: holds its config.json, model.safetensors (or its parts) and tokenizer
    """

    name: str
    folder: Path

    @classmethod
    def find(cls, name: str, cache_dir: Path) -> "StartModel":
        """Look for it, and download it if need be.

        :raises UserError: it is not there, or its weights are a pickle.
        """
        folder = find_checkpoint(name, cache_dir, NEEDED)
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"There is no model in {name}: {CONFIG} is missing. Set start_from to a folder that "
                f"`save_pretrained` has written, or to ORG/NAME of a repository on the Hugging Face Hub."
            )
        if not any(folder.glob("model*.safetensors")):
            raise UserError(
                f"The model {name} has no {WEIGHTS}. Weights in other files (pytorch_model.bin) are not opened, "
                f"because a pickle from elsewhere can run any program. Convert it on a computer that trusts it, with "
                f"from_pretrained and save_pretrained of transformers, and set start_from to the new folder."
            )
        return cls(name, folder)

    @property
    def revision(self) -> str | None:
        """The commit on the Hub; None for a folder."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def config(self) -> dict[str, Any]:
        """Its config.json. :raises UserError: it is no masked language model."""
        config = read_config(self.folder / CONFIG, called=f"The model {self.name}")
        return {key: value for key, value in config.items() if key not in OF_THEIR_TIME}

    def refuse_vocabulary(self, entries: int, tokenizer: str | None) -> None:
        """Refuse a tokenizer for which the weights were not made.

        :param entries: of the tokenizer
        :param tokenizer: its name, if it is not the model's own. Published models may have rows to spare for theirs
        """
        rows = make_config(self.config()).vocab_size
        if entries > rows or (tokenizer and entries != rows):
            whose = f"the tokenizer {tokenizer!r}" if tokenizer else "its tokenizer"
            advice = "Leave `tokenizer` out" if tokenizer else "Set start_from to a model whose files fit each other"
            raise UserError(
                f"The model {self.name} has weights for a vocabulary of {rows:,} entries, but {whose} has "
                f"{entries:,}: each of them would stand for something else. {advice}, or start from scratch."
            )

    def keep(self, config: Mapping[str, Any], seed: int, cache_dir: Path) -> "FirstWeights":
        """Read the weights, in float32, and keep them in `cache_dir` as the run begins with them.

        :param config: the run's; it differs from the model's own in nothing that concerns a weight
        :param seed: of heads that the model does not have
        :raises UserError: its weights cannot be read, or are those of another model
        """
        torch.manual_seed(seed)
        try:
            with _quietly():
                model, report = auto_class(config["model_type"]).from_pretrained(
                    self.folder, config=make_config(config), dtype=torch.float32, use_safetensors=True,
                    trust_remote_code=False, local_files_only=True, output_loading_info=True,
                )  # fmt: skip
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"The weights of the model {self.name} cannot be read: {reason} They do not fit its {CONFIG}, or a "
                f"file is damaged. Set start_from to another model, or download this one again."
            ) from error
        trunk = f"{model.base_model_prefix}."
        missing = sorted(report["missing_keys"])
        lost = [key for key in missing if key.startswith(trunk) and "pooler" not in key]
        if lost:
            raise UserError(
                f"The model {self.name} lacks {len(lost)} of its own weights ({', '.join(lost[:3])} ...): it is "
                f"another model than its {CONFIG} says, or a part of one. Set start_from to a whole model."
            )
        new = sorted({".".join(key.split(".")[:2]) for key in missing})
        if new:
            logger.info("The model %s has no %s: new weights from the run's seed", self.name, ", ".join(new))
        home = cache_dir / "first_weights"
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".") as scratch:
            model.save_pretrained(scratch, max_shard_size="1000GB")
            with Path(scratch, WEIGHTS).open("rb") as file:
                fingerprint = file_digest(file, "sha256").hexdigest()
            first = FirstWeights(self.name, self.revision, fingerprint, new)
            with replacing_folder(first.folder(cache_dir), keep_existing=True) as place:
                for path in Path(scratch).iterdir():
                    path.rename(place / path.name)
        return first


@dataclass(frozen=True)
class FirstWeights:
    """Which weights a run begins with.

    :param source: what the organizer named
    :param revision: the commit of it on the Hub; None for a folder
    :param sha256: of their file
    :param new: what the source did not have, such as a head for sentence order
    """

    source: str
    revision: str | None
    sha256: str
    new: list[str]

    @classmethod
    def of_run(cls, folder: Path) -> "FirstWeights | None":
        """What the run's files say; None if the run begins from scratch."""
        path = folder / FILE
        if not path.exists():
            return None
        first = cls(**json.loads(path.read_text(encoding="utf-8")))
        if not re.fullmatch("[0-9a-f]{64}", first.sha256):  # it names a folder, and comes from elsewhere
            raise UserError(f"{path} is damaged: {first.sha256!r} is no fingerprint. Ask the organizer of the run.")
        return first

    def as_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()

    def folder(self, cache_dir: Path) -> Path:
        return cache_dir / "first_weights" / self.sha256

    def load_into(self, model: torch.nn.Module, cache_dir: Path) -> bool:
        """Fill the model, if the weights are on this computer; returns whether they are."""
        folder = self.folder(cache_dir)
        if not folder.exists():
            return False
        load_weights_into(model, folder)
        return True

    @property
    def repository(self) -> str | None:
        """ORG/NAME of the source on the Hub; None for a folder."""
        return self.source.removeprefix("hub:").partition("@")[0] if self.revision else None

    def describe(self) -> str:
        at = f" at {self.revision[:8]}" if self.revision else ""
        new = f"; {', '.join(self.new)} new" if self.new else ""
        return f"{self.source}{at}{new}"


@contextmanager
def _quietly() -> Any:
    """Without the table of transformers about what was missing: we say it ourselves."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
