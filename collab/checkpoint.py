"""Checkpoints on disk: the Hub's own layout, written whole or not at all, read without trusting the file."""

import base64
import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from collab.errors import UserError
from collab.files import replacing_folder, write_text

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
OPTIMIZER_TENSORS, OPTIMIZER_STRUCTURE = "optimizer.safetensors", "optimizer.json"
TRAINER_STATE = "trainer_state.json"
OF_RUN = (TRAINER_STATE, OPTIMIZER_STRUCTURE, OPTIMIZER_TENSORS)
"""What a checkpoint of a run has beside a model's own files."""
SUMMED = (CONFIG, WEIGHTS, OPTIMIZER_STRUCTURE, OPTIMIZER_TENSORS)
"""Files whose SHA-256 the trainer's state has: a bit that a disk loses leaves numbers that can still be read."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
FORMAT = 1  # raise it when an older Samiti could misread what a newer one writes

# Two models may differ in these settings and still be the same function of the same weights.
HARMLESS_SETTINGS = re.compile(
    r"dropout|initializer|_token_id$|^_|^transformers_version$|^(torch_)?dtype$|^architectures$|^output_|^return_dict$"
    r"|^use_cache$|^problem_type$|^id2label$|^label2id$|^num_labels$"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says beside the weights, which `load_weights_into` reads.

    :param folder: where it was read from.
    :param optimizer_state: for `optimizer.load_state_dict`; its tensors are on the CPU.
    :param trainer_state: run id, global step, samples and whatever else the run wrote down.
    """

    folder: Path
    optimizer_state: dict[str, Any]
    trainer_state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    *,
    save_pretrained: Callable[[Path], None],
    optimizer_state: dict[str, Any],
    trainer_state: dict[str, Any],
    model_card: str,
    more_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that `from_pretrained` opens and `load_checkpoint` continues from.

    :param folder: it appears, or takes the place of the one that stood there, only when everything is on disk.
    :param save_pretrained: writes config.json, model.safetensors and the tokenizer into the folder that it is given.
    :param optimizer_state: `optimizer.state_dict()`; comes back exactly (types, int keys, shared tensors).
    :param trainer_state: plain JSON values.
    :param model_card: the text of README.md.
    :param more_files: {name: content} of what else the run wants beside them.
    :raises UserError: the disk is full or the folder cannot be written; what stood there before is untouched.
    """
    structure, tensors = _split(optimizer_state)
    with replacing_folder(folder) as scratch, _full_disk_as_os_error():
        save_pretrained(scratch)
        save_file(tensors, scratch / OPTIMIZER_TENSORS)
        (scratch / OPTIMIZER_STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")
        state = {**trainer_state, "format": FORMAT, "sha256": _sums(scratch)}
        (scratch / TRAINER_STATE).write_text(json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8")
        (scratch / CARD).write_text(model_card, encoding="utf-8")
        for name, content in (more_files or {}).items():
            (scratch / name).write_bytes(content)


def _sums(folder: Path) -> dict[str, str]:
    sums = {}
    for name in SUMMED:
        with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as file:
            sums[name] = file_digest(file, "sha256").hexdigest()
    return sums


def annotate_checkpoint(folder: Path, measured: Mapping[str, float], model_card: str) -> None:
    """Add to `trainer_state.json` what was found out about a checkpoint after it was written, and tell it in README.md.

    :raises UserError: nothing can be written; the checkpoint stays as it was.
    """
    state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    write_text(folder / TRAINER_STATE, json.dumps({**state, **measured}, indent=2, ensure_ascii=False))
    write_text(folder / CARD, model_card)


def find_checkpoint(name: str, cache_dir: Path, files: Sequence[str]) -> Path:
    """The folder of a checkpoint, which is downloaded if need be.

    :param name: a folder, or ORG/NAME or ORG/NAME@REVISION on the Hugging Face Hub; `hub:` before it says that no
        folder is meant.
    :param cache_dir: where downloads are kept; what lies there already is not downloaded again.
    :param files: patterns of what is downloaded.
    :raises UserError: it is neither.
    """
    on_hub = name.removeprefix("hub:")
    if on_hub == name and (Path(name).exists() or not HUB_NAME.fullmatch(name)):
        return Path(name)
    repo_id, _, revision = on_hub.partition("@")
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision or None, cache_dir=cache_dir / "hub", allow_patterns=list(files)
            )
        )
    except Exception as error:
        raise UserError(
            f"There is no folder {name} here, and it could not be downloaded from the Hugging Face Hub either: {error} "
            f"Give the folder of a checkpoint, or ORG/NAME of a repository that has one."
        ) from error


def begin_from_checkpoint(model: torch.nn.Module, settings: Mapping[str, Any], cache_dir: Path) -> Checkpoint | None:
    """Fill the model for a new run that goes on from the checkpoint of another one, as its settings say.

    :param settings: `start_from` names the checkpoint, as for `find_checkpoint`.
    :returns: what else the run goes on with; None if it begins at global step 0 with the weights that the model has.
    :raises UserError: there is nothing of that name, it is damaged, or it is at the end of this run already.
    """
    name = settings["start_from"]
    if name is None or settings["from_step_zero"]:
        return None
    folder = find_checkpoint(name, cache_dir, (CONFIG, WEIGHTS, *OF_RUN))
    if not all((folder / part).exists() for part in OF_RUN):
        return None
    found = load_checkpoint(folder)
    step, last = found.trainer_state.get("global_step"), settings["max_global_steps"]
    if not isinstance(step, int) or step >= last:
        raise UserError(
            f"The checkpoint {name} is of global step {step}, and this run would end after {last}. Raise "
            f"max_global_steps, or take only its weights with --from_step_zero true."
        )
    load_weights_into(model, folder)
    return found


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the optimizer's and the trainer's state; nothing in the files is executed.

    :raises UserError: the folder is missing, is no checkpoint, is damaged or was written by a newer version.
    """
    with _readable(folder):
        trainer_state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        written_as = trainer_state.pop("format")
        if written_as != FORMAT:
            raise UserError(
                f"The checkpoint {folder} has format {written_as!r}, this version of Samiti reads format {FORMAT}. "
                f"Update with `git pull`, or give another checkpoint."
            )
        wanted = trainer_state.pop("sha256", None)  # older checkpoints have none
        if wanted is not None and (found := _sums(folder)) != wanted:
            differing = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
            raise ValueError(f"what was written to {', '.join(differing)} is not what is there")
        structure = json.loads((folder / OPTIMIZER_STRUCTURE).read_text(encoding="utf-8"))
        optimizer_state = _join(structure, load_file(folder / OPTIMIZER_TENSORS))
        if not isinstance(optimizer_state, dict):
            raise ValueError(f"{OPTIMIZER_STRUCTURE} holds no optimizer state")
    return Checkpoint(Path(folder), optimizer_state, trainer_state)


def random_state() -> dict[str, Any]:
    """Where torch's random numbers stand, such as dropout's, on the CPU and all GPUs. JSON, 7 kB."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def set_random_state(record: object) -> None:
    """Go on where `random_state` was called; without a record that fits this computer, with other numbers."""
    for device, text in record.items() if isinstance(record, dict) else ():
        try:
            state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
            if device == "cpu":
                torch.set_rng_state(state)
            elif device.startswith("cuda:") and int(device[5:]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, device)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            logger.warning("The saved random numbers of %s cannot be used: %s", device, error)


def load_weights_into(model: torch.nn.Module, folder: Path) -> None:
    """Fill `model` with the weights of a checkpoint folder: all of them or, if anything does not fit, none.

    Of tensors that the model ties together (ALBERT's decoder and its embeddings) one in the file is enough. The
    configuration is compared as well, because ALBERT with 6 layers has the same tensors as ALBERT with 12.

    :param model: on any device; with a transformers `config` or without.
    :raises UserError: the folder is no readable checkpoint, or is one of another model; the text says what differs.
    """
    expected = model.state_dict()
    with _readable(folder):
        differences = _config_differences(model, folder)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no iterator)
        filled = {_place(expected[name]) for name in found if name in expected}
        differences += _first_three("missing", [n for n, t in expected.items() if _place(t) not in filled])
        differences += _first_three("unexpected", [name for name in found if name not in expected])
        differences += _first_three(
            "of another shape",
            [
                f"{name} {list(found[name])} instead of {list(tensor.shape)}"
                for name, tensor in expected.items()
                if name in found and found[name] != tuple(tensor.shape)
            ],
        )
        if not differences:
            model.load_state_dict(load_file(folder / WEIGHTS), strict=False)  # strictness was checked above
    if differences:
        raise UserError(
            f"The checkpoint {folder} belongs to another model: {'; '.join(differences)}. Nothing was loaded. "
            f"Give the checkpoint of this run, or the configuration with which this checkpoint was trained."
        )


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor (an empty tensor has no address, so that its identity has to do)."""
    return (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())


def _first_three(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return [f"{len(items)} {what} ({', '.join(items[:3])}{more})"]


def _config_differences(model: torch.nn.Module, folder: Path) -> list[str]:
    """One sentence part for each setting in which the checkpoint's config.json contradicts the model's config."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return []
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if saved.get("model_type") != config.model_type:
        return [f"model_type {saved.get('model_type')!r} instead of {config.model_type!r}"]
    # config.json leaves out what equals the library's default: both sides have to be spelled out in full.
    ours, theirs = (json.loads(c.to_json_string(use_diff=False)) for c in (config, type(config).from_dict(saved)))
    return [
        f"{key} {theirs.get(key)!r} instead of {ours.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not HARMLESS_SETTINGS.search(key)
    ]


def _split(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Divide nested state into JSON and tensors by name.

    JSON knows neither int keys nor tuples nor tensors, so each of these becomes an object with one key that says what
    it is: {"dict": [[key, value], ...]}, {"tuple": [...]}, {"tensor": name}, {"float": "nan"}.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in names:
                names[id(value)] = path
                tensor = value.detach().cpu().contiguous()
                # Two views of one storage are two tensors here: safetensors refuses to guess what is meant.
                if tensor.untyped_storage().data_ptr() in storages:
                    tensor = tensor.clone()
                storages.add(tensor.untyped_storage().data_ptr())
                tensors[path] = tensor
            return {"tensor": names[id(value)]}
        if isinstance(value, dict):
            if not all(type(key) in (str, int) for key in value):
                raise TypeError(f"optimizer state {path or 'root'} has keys that are neither str nor int")
            return {"dict": [[key, encode(item, f"{path}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, list):
            return [encode(item, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [encode(item, f"{path}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no inf and no nan
            return {"float": repr(float(value))}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"optimizer state {path} is a {type(value).__name__}, which JSON cannot hold")

    return encode(state, ""), tensors


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_split`; a ValueError or KeyError if the structure is not one that `_split` writes."""
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _join(item, tensors) for key, item in content}
        case "tuple":
            return tuple(_join(item, tensors) for item in content)
        case "float":
            return float(content)
    raise ValueError(f"unknown kind {kind!r}")


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn everything that a missing, damaged or foreign file can cause into one UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a whole checkpoint: {Path(error.filename).name if error.filename else error} is missing. "
            f"Give the folder that holds {WEIGHTS} and {TRAINER_STATE}."
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The checkpoint {folder} cannot be read ({type(error).__name__}: {error}). A file in it is damaged or was "
            f"not written by Samiti. Give an older checkpoint, or copy this one again."
        ) from error


@contextlib.contextmanager
def _full_disk_as_os_error() -> Iterator[None]:
    """Libraries written in Rust (safetensors, tokenizers) report a failed write as an exception of their own, whose
    text alone carries the system's error number: give it back its type, so that the person reads the right advice."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1)))) from error
