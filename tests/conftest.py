"""What the tests of several folders share."""

from pathlib import Path

import pytest

from tasks.mlm.corpus import embedded_documents
from tokenizer.train import train_tokenizer

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
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few hundred real English documents."""
    return embedded_documents(tmp_path_factory.mktemp("corpus"), budget=1_000_000)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A trained tokenizer of 2,048 pieces that knows some English, Bengali and Arabic."""
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(corpus + 20 * (BENGALI + ARABIC), folder, vocab_size=2048)
    return folder
