"""Texts in all forms that sources can be read from."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tasks.mlm.corpus import is_heldout

RANDOM = np.random.default_rng(0)
TEXTS = [f"{number} {RANDOM.bytes(40).hex()}\n{RANDOM.bytes(10).hex()}" for number in range(4000)]
TRAIN = [text for text in TEXTS if not is_heldout(text)]
HELDOUT = [text for text in TEXTS if is_heldout(text)]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
KINDS = [".parquet", *(form + compression for form in (".txt", ".jsonl") for compression in COMPRESS)]


def json_lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(texts: list[Any], rows: int = 100, **more: list[Any]) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"text": texts, **more}), buffer, row_group_size=rows)
    return buffer.getvalue()


def encoded(kind: str, texts: list[str] = TEXTS) -> bytes:
    """A file of the given ending, such as .jsonl.gz, with these texts."""
    if kind == ".parquet":
        return parquet(texts)
    form, compression = re.fullmatch(r"(\.\w+?)(\.\w+)?", kind).groups()  # type: ignore[union-attr]
    return COMPRESS[compression or ""](json_lines(texts) if form == ".jsonl" else "\n\n".join(texts).encode())
