"""Image classification: the quick start, on pictures of CIFAR-10's shape."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageClassification
from transformers.utils.logging import disable_progress_bar

from collab.checkpoint import CONFIG, OF_RUN, TRAINER_STATE, WEIGHTS, find_checkpoint
from collab.errors import UserError
from tasks.image_classification.images import Images, as_input, open_images

disable_progress_bar()

AT_ONCE = 256  # pictures of a held-out batch


class ImageStream:
    """Micro-batches of a data set, in an order of its own for each place and each time that all were seen."""

    def __init__(
        self,
        images: Images,
        to_batch: Callable[[list[int]], dict[str, torch.Tensor]],
        size: Callable[[], int],
        seed: str,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._images, self._to_batch, self._size, self._seed = images, to_batch, size, seed
        self._round: int = state["round"] if state else 0
        self._done: int = state["done"] if state else 0
        self._order = self._shuffled()

    def __iter__(self) -> "ImageStream":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._done >= len(self._order):
            self._round, self._done = self._round + 1, 0
            self._order = self._shuffled()
        chosen = self._order[self._done : self._done + self._size()]
        self._done += len(chosen)
        return self._to_batch(chosen)

    def state_dict(self) -> dict[str, Any]:
        return {"round": self._round, "done": self._done}

    def close(self) -> None:
        """Nothing is waited for."""

    def _shuffled(self) -> list[int]:
        return random.Random(f"{self._seed} {self._round}").sample(range(len(self._images)), len(self._images))


class ImageClassification:
    """The image classification task. See `tasks.Task` for what each method is for."""

    first_weights: Literal["everywhere", "here", "elsewhere"] = "everywhere"

    def __init__(self, settings: Mapping[str, Any], folder: Path, cache_dir: Path) -> None:
        self.settings, self.cache_dir = settings, cache_dir
        if settings["start_from"]:
            self.first_weights = "elsewhere"  # the checkpoint's, which the organizer's peer hands out
        self._config = AutoConfig.from_pretrained(folder)
        torch.manual_seed(settings["seed"])  # every peer starts from the same weights
        self.model: torch.nn.Module = AutoModelForImageClassification.from_config(self._config, dtype=torch.float32)
        self._parts: dict[str, Images] = {}

    @staticmethod
    def prepare(settings: Mapping[str, Any], cache_dir: Path) -> dict[str, bytes]:
        if (name := settings["start_from"]) and (
            settings["from_step_zero"]
            or not (find_checkpoint(name, cache_dir, (CONFIG, WEIGHTS, *OF_RUN)) / TRAINER_STATE).exists()
        ):
            raise UserError(
                f"A run of this task can only go on from another run's checkpoint, at its global step; {name} is none, "
                f"or --from_step_zero was given."
            )
        config = _read_config(Path(settings["image_model"]))
        classes = open_images(settings["dataset"], "train", cache_dir).classes
        config |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
        model = AutoModelForImageClassification.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.modules.batchnorm._NormBase) and layer.track_running_stats:
                raise UserError(
                    f"{settings['image_model']} has batch normalisation ({name}), whose running statistics each peer "
                    f"would keep for itself. Take a model with layer or group normalisation, such as convnext."
                )
        return {"config.json": json.dumps(config, indent=2, sort_keys=True).encode()}

    @staticmethod
    def refuse_other_files(given: Mapping[str, Any], folder: Path) -> None:
        path = given.get("image_model")
        if path and Path(path).is_file():
            here, there = _read_config(Path(path)), _read_config(folder / "config.json")
            differing = sorted(key for key in here if here[key] != there.get(key))
            if differing:
                what = "; ".join(f"{key} = {here[key]}, but this run uses {there.get(key)}" for key in differing)
                raise UserError(f"The model in your {path} is not the run's: {what}. Leave it out, and you get that.")

    def batches(
        self,
        micro_batch_size: Callable[[], int],
        place: str,
        *,
        step: Callable[[], int],
        state: dict[str, Any] | None = None,
    ) -> ImageStream:
        images = self._part("train")
        seed = f"{self.settings['seed']} {place}"
        return ImageStream(images, lambda chosen: self._batch(images, chosen), micro_batch_size, seed, state)

    def trial_batch(self, samples: int) -> dict[str, torch.Tensor]:
        drawn = torch.Generator().manual_seed(0)
        shape = samples, self._config.num_channels, self._config.image_size, self._config.image_size
        return {
            "pixel_values": torch.rand(shape, generator=drawn) * 2 - 1,
            "labels": torch.arange(samples) % self._config.num_labels,
        }

    def tokens(self, batch: dict[str, torch.Tensor]) -> int:
        """Pictures."""
        return len(batch["labels"])

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(self.model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"])

    @torch.no_grad()
    def evaluate(self, most_batches: int, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        images, device, was_training = self._part("heldout"), next(self.model.parameters()).device, self.model.training
        total, right, seen = 0.0, 0, 0
        self.model.eval()
        try:
            for first in range(0, min(len(images), most_batches * AT_ONCE), AT_ONCE):
                if stop():
                    return {}
                batch = self._batch(images, range(first, min(first + AT_ONCE, len(images))))
                logits = self.model(pixel_values=batch["pixel_values"].to(device)).logits.float().cpu()
                total += float(cross_entropy(logits, batch["labels"], reduction="sum"))
                right += int((logits.argmax(1) == batch["labels"]).sum())
                seen += len(batch["labels"])
        finally:
            self.model.train(was_training)
        return {"held_out_loss": total / seen, "held_out_accuracy": right / seen} if seen else {}

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]

    def usage(self, name: str) -> str:
        shape = f"1, {self._config.num_channels}, {self._config.image_size}, {self._config.image_size}"
        return (
            "import torch\nfrom transformers import AutoModelForImageClassification\n\n"
            f'model = AutoModelForImageClassification.from_pretrained("{name}")\n'
            f"picture = torch.zeros({shape})  # from -1 (black) to 1 (white)\n"
            "print(model.config.id2label[model(picture).logits.argmax().item()])"
        )

    def card_metadata(self) -> dict[str, Any]:
        hub = self.settings["dataset"]
        is_there = hub.count("/") == 1 and not Path(hub).exists()
        return {"pipeline_tag": "image-classification", "datasets": [hub] if is_there else [], "base_model": None}

    def description(self) -> dict[str, str]:
        parameters = sum(param.numel() for param in self.model.parameters())
        return {
            "Model": f"{type(self.model).__name__}, {parameters / 1e6:.2g} M parameters",
            "Objective": f"classification of pictures into {self._config.num_labels} classes",
            "Data": f"the data set {self.settings['dataset']}",
        }

    def _part(self, part: str) -> Images:
        if part not in self._parts:
            self._parts[part] = open_images(self.settings["dataset"], part, self.cache_dir)
        return self._parts[part]

    def _batch(self, images: Images, chosen: list[int] | range) -> dict[str, torch.Tensor]:
        pictures, labels = images.take(chosen)
        return {
            "pixel_values": as_input(pictures, self._config.num_channels, self._config.image_size),
            "labels": labels,
        }


def _read_config(path: Path) -> dict[str, Any]:
    """A config.json. :raises UserError: it cannot be read, or is none of a model that classifies pictures."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        sizes = made.num_channels, made.image_size + 0
    except OSError as error:
        raise UserError(f"The model config {path} cannot be read: {error.strerror}. Set image_model.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no config of a model that classifies pictures ({type(error).__name__}: {error}): it needs "
            f'"model_type" (for example "convnext"), "image_size" and "num_channels".'
        ) from error
    del sizes
    return config
