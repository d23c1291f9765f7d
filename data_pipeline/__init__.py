"""From text to packed batches.

    text, JSONL -> ``hsa data tokenize`` -> shards (WebDataset tar + index + manifest) -> lanes -> packed batches

The order of the global batches depends on the seed and the number of lanes only, never on the number of readers::

    data = DataConfig(tokenizer="shards", mix=[MixEntry("books", "shards", 1.0)])
    stream = open_stream(data, lanes=4, lane_ids=[0, 1, 2, 3], batch=8, context=512, chunk_size=64, seed=1)
    batch = stream.next_batch()
    position = stream.state_dict()  # go on from here with any number of ranks

docs/data.md describes the formats. Nothing here imports torch until a batch is made: the reader process stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "DataError": "errors",
    "DataConfig": "config",
    "MixEntry": "config",
    "SyntheticConfig": "config",
    "TASKS": "config",
    "PackedBatch": "batch",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "SyntheticSample": "synthetic",
    "build_sample": "synthetic",
    "BatchStream": "lanes",
    "open_stream": "lanes",
    "PrefetchingStream": "prefetch",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"data_pipeline.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")
