"""What the tests of several folders share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts.browser import Browser, find_chromium
from tasks.mlm.corpus import embedded_documents
from tokenizer.train import train_tokenizer

torch.set_num_threads(1)  # models are tiny: with more, threads would mostly wait for each other, at full speed

# Some sentences in scripts beyond Latin, with conjuncts, nukta, joiners, vowel marks.
BENGALI = [
    "আমি প্রতিদিন সকালে নদীর ধারে হাঁটতে যাই।",
    "ক্ষুদ্র ঋণ নিয়ে গ্রামের মহিলারা ব্যবসা শুরু করেছেন।",
    "র‍্যাব ও র‌্যালি শব্দ দুটির বানানে যুক্তাক্ষর আছে।",
    "বড় মাছটি গাঢ় সবুজ জলে ডুবে গেল, তাই না?",
]
ARABIC = [
    "ذهبت الطبيبة إلى المستشفى في الصباح الباكر.",
    "هَلْ قَرَأْتَ الكِتابَ الجَديدَ؟ نعم، قرأته أمس.",
    "این کتاب را می‌خوانم و نامه‌ها را می‌نویسم.",
]


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for all tests, with the embedded text, which takes seconds to read, and what they add to it."""
    folder = tmp_path_factory.mktemp("cache")
    embedded_documents(folder)
    return folder


@pytest.fixture
def cache_dir(tmp_path: Path, shared_cache: Path) -> Path:
    """A cache folder for one test, with nothing but the embedded text in it."""
    (tmp_path / "cache").mkdir()
    shutil.copy(shared_cache / "embedded_corpus.json", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few hundred real English documents."""
    return embedded_documents(tmp_path_factory.mktemp("corpus"), budget=1_000_000)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A trained tokenizer of 2,048 pieces that knows some English, Bengali and Arabic."""
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(corpus + 20 * (BENGALI + ARABIC), folder, vocab_size=2048)
    return folder


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    if (program := find_chromium()) is None:
        pytest.skip("NOT TESTED: the page in a browser, because there is no Chromium. apt-get install chromium")
    with Browser(program) as browser:
        yield browser
