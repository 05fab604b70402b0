"""Trying a checkpoint: which words a trained masked language model would put into a gap."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 500
SECONDS_BETWEEN = 1.0
ANSWERS = 5
GAP = "[MASK]"
"""What people type for the gap, whatever the tokenizer calls it."""


class Refused(Exception):
    """Why there is no answer, for the person who asked; `status` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guess(NamedTuple):
    """One word for the gap, with the model's probability of it."""

    word: str
    probability: float


class Answer(NamedTuple):
    step: int
    guesses: list[Guess]


class FillMask:
    """Fills gaps with the newest checkpoint, one question at a time.

    The model is opened from its folder when somebody asks, and kept until there is a newer one.

    :param newest: (global step, folder) of the newest checkpoint; None as long as there is none.
    :param seconds_between: from one question to the next, of all people together: the computer's other duties go first.
    """

    def __init__(self, newest: Callable[[], tuple[int, Path] | None], seconds_between: float = SECONDS_BETWEEN) -> None:
        self._newest, self._seconds_between = newest, seconds_between
        self._open: tuple[Path, Any] | None = None
        self._busy = threading.Lock()
        self._free_at = 0.0

    def answer(self, text: str) -> Answer:
        """The likeliest words for the one gap in `text`.

        :raises Refused: the text has no gap or several, or is too long; no checkpoint is there; others are asking. It
            has a cause if the model failed, which is nothing that the person who asked can mend.
        """
        if len(text) > MAX_CHARACTERS:
            raise Refused(400, f"The text is longer than {MAX_CHARACTERS} characters.")
        if text.count(GAP) != 1:
            raise Refused(400, f"Put {GAP} in the place of one word.")
        if self._newest() is None:
            raise Refused(503, "No checkpoint has been saved yet.")
        if not self._busy.acquire(blocking=False):
            raise Refused(429, "Somebody else is asking. Try again in a moment.")
        try:
            if time.monotonic() < self._free_at:
                raise Refused(429, "Many people are asking. Try again in a moment.")
            try:
                return self._fill(text)
            except Exception as error:
                logger.warning("The newest checkpoint could not fill a gap: %r", error)
                raise Refused(503, f"The newest checkpoint could not answer ({type(error).__name__}).") from error
            finally:
                self._free_at = time.monotonic() + self._seconds_between
        finally:
            self._busy.release()

    def _fill(self, text: str) -> Answer:
        from transformers import pipeline  # slow to import, and few runs are asked

        newest = self._newest()  # not before: an older one may be removed meanwhile
        assert newest is not None
        step, folder = newest
        if self._open is None or self._open[0] != folder:
            self._open = None  # the old model's memory first
            try:
                self._open = folder, pipeline("fill-mask", model=str(folder), device="cpu")
            except Exception as error:
                if self._newest() == newest:
                    raise
                logger.warning("A checkpoint was removed while it was opened; the newer one is asked: %r", error)
                return self._fill(text)
        fill: Any = self._open[1]
        found = fill(text.replace(GAP, fill.tokenizer.mask_token), top_k=ANSWERS, tokenizer_kwargs={"truncation": True})
        return Answer(step, [Guess(str(entry["token_str"]).strip(), float(entry["score"])) for entry in found])
