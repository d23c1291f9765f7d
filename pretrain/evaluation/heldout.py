"""Held-out text, and what a unigram model knows of the training text."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.config import MixEntry
from data_pipeline.shards import ShardSet
from data_pipeline.sources import find_sources, read_documents
from pretrain.errors import RecipeError

_COUNT_TOKENS = 1 << 23  # tokens counted per entry of the mix: plenty for a unigram model, a second to read


def load_held_out(path: str | None, tokenizer) -> np.ndarray:
    """Tokens int32 (n,) of a text or JSONL file (or a folder of them); documents are joined by the end token.

    Raises RecipeError when no path is given or there is no text, DataError for a missing or damaged file.
    """
    if not path:
        raise RecipeError("no held-out text: set data.held_out=PATH to a text or JSONL file that was never trained on")
    parts: list[np.ndarray] = []
    texts = [document.text for document in read_documents(find_sources([path]))]
    for ids in tokenizer.encode_batch(texts):
        if ids:
            parts += [np.array([tokenizer.eos_id]), np.array(ids)] if parts else [np.array(ids)]
    if not parts:
        raise RecipeError(f"data.held_out: {path} holds no text")
    return np.concatenate(parts).astype(np.int32)


def unigram_counts(
    mix: Sequence[MixEntry], vocab_size: int, *, limit: int = _COUNT_TOKENS, seed: int = 0
) -> np.ndarray:
    """Token counts float64 (vocab_size,) of the training mix: each entry's counts, scaled to its weight.

    Of an entry with more than ``limit`` tokens a random choice of documents is counted. Raises DataError for missing or
    damaged shards.
    """
    counted = [(entry.weight, _count(entry, vocab_size, limit, np.random.default_rng(seed))) for entry in mix]
    counted = [(weight, counts) for weight, counts in counted if weight > 0 and counts.sum() > 0]
    if not counted:
        raise RecipeError("data.mix: there are no tokens to count for the unigram model")
    tokens = sum(counts.sum() for _, counts in counted)
    weights = sum(weight for weight, _ in counted)
    shares = [tokens * weight / weights * counts / counts.sum() for weight, counts in counted]
    return np.sum(shares, axis=0)


def _count(entry: MixEntry, vocab_size: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    shards = ShardSet(entry.path)
    names = [domain.name for domain in shards.domains]
    name = entry.domain or (entry.name if entry.name in names else names[0])
    domain = shards.domain(name)
    counts = np.zeros(vocab_size)
    left = limit
    order = rng.permutation(domain.documents) if domain.tokens > limit else np.arange(domain.documents)
    for document in order + domain.first:
        length = min(left, int(shards.index["length"][document]))
        ids = shards.read(int(document), 0, length)
        counts += np.bincount(ids, minlength=vocab_size)[:vocab_size]
        left -= length
        if left <= 0:
            break
    shards.close()
    return counts
