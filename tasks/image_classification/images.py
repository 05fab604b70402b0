"""Pictures with a class each: scikit-learn's digits, which need no download, or any such data set of the Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import interpolate

from collab.errors import UserError

DIGITS = "digits"
TRAINED_DIGITS = 1500  # of 1,797; the last ones were written by other people
PARTS = {"train": ("train",), "heldout": ("test", "validation", "valid")}
"""What the splits of a data set on the Hub are called that serve as each part, the first choice first."""


class Images(Protocol):
    """One part of a data set."""

    classes: Sequence[str]
    """Name of each class; a label is a place in it."""

    def __len__(self) -> int: ...

    def take(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures at these places: uint8 [pictures, channels (1 or 3), height, width], and int64 labels."""


class Digits:
    """Hand-written digits of 8 x 8 pixels (scikit-learn's `load_digits`; Alpaydin and Kaynak 1998)."""

    def __init__(self, part: str) -> None:
        from sklearn.datasets import load_digits  # a second to import

        bunch = load_digits()
        own = slice(TRAINED_DIGITS) if part == "train" else slice(TRAINED_DIGITS, None)
        self._pixels = torch.from_numpy(bunch.images[own] * (255 / 16)).round().to(torch.uint8)[:, None]
        self._labels = torch.from_numpy(bunch.target[own])
        self.classes: Sequence[str] = tuple(map(str, bunch.target_names))

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.as_tensor(places)
        return self._pixels[chosen], self._labels[chosen]


class HubImages:
    """A data set of the Hub, or a folder, with one column of pictures and one of classes. Pictures of one size.

    :raises UserError: it cannot be had, or has no such columns.
    """

    def __init__(self, name: str, part: str, cache_dir: Path) -> None:
        from datasets import ClassLabel, DatasetDict, Image, load_dataset  # a second to import

        try:
            splits: DatasetDict = load_dataset(name, cache_dir=str(cache_dir / "datasets"))
        except Exception as error:  # datasets, huggingface_hub and their HTTP client each raise their own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"The data set {name} cannot be had: {reason}. Set `dataset` to digits, ORG/NAME on the Hub, or a "
                f"folder; a private one needs `hf auth login`."
            ) from error
        split = next((split for split in PARTS[part] if split in splits), None)
        if split is None:
            raise UserError(f"{name} has the splits {', '.join(splits)}, and none that is {' or '.join(PARTS[part])}.")
        self._rows = splits[split]
        columns = self._rows.features.items()
        self._picture = next((column for column, feature in columns if isinstance(feature, Image)), "")
        self._label = next((column for column, feature in columns if isinstance(feature, ClassLabel)), "")
        if not (self._picture and self._label):
            has = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in columns)
            raise UserError(f"{name} needs a column of type Image and one of type ClassLabel; it has {has}.")
        self.classes: Sequence[str] = tuple(self._rows.features[self._label].names)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows: dict[str, Any] = self._rows[list(places)]
        pictures = np.stack([np.asarray(picture.convert("RGB")) for picture in rows[self._picture]])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.tensor(rows[self._label])


def open_images(name: str, part: str, cache_dir: Path) -> Images:
    """A part of the data set called `name`.

    :param part: train, or heldout: what nobody trains on.
    """
    return Digits(part) if name == DIGITS else HubImages(name, part, cache_dir)


def as_input(pictures: torch.Tensor, channels: int, size: int) -> torch.Tensor:
    """What a model sees: float32 [pictures, channels, size, size], from -1 (black) to 1; other sizes are stretched."""
    values = pictures.float() / 127.5 - 1
    if values.shape[-2:] != (size, size):
        values = interpolate(values, size=(size, size), mode="bilinear")
    return values.expand(-1, channels, -1, -1) if values.shape[1] == 1 else values
