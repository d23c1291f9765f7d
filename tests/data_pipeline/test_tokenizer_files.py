"""tiktoken ranks and SentencePiece models give the ids of their own libraries."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import EOS, Tokenizer, load_tokenizer
from data_pipeline.tokenizer_files import PATTERNS, tokenizer_text
from data_pipeline.tokenizing import tokenize

TEXTS = [
    "The old river saw a bright bridge.",
    "  Zürich 漢字\t\n\n x=3.14 isn't",
    "12345 a  b\r\n",
    " ",
    "🙂🙂",
    "I'll SHE'S",
]


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The trained BPE as ranks: bytes first, then the merges in order."""
    from data_pipeline.tokenizer_files import _byte_characters

    byte_of = {c: b for b, c in enumerate(_byte_characters())}
    vocabulary = json.loads(Path(tokenizer.path).read_text())["model"]["vocab"]
    tokens = [bytes(byte_of[c] for c in t) for t, _ in sorted(vocabulary.items(), key=lambda i: i[1]) if "<|" not in t]
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_tiktoken_ranks(corpus: Path, tokenizer: Tokenizer, tmp_path: Path, pattern: str) -> None:
    ranks = ranks_of(tokenizer)
    file = tmp_path / "mine.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    reference = tiktoken.Encoding("mine", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    (tmp_path / "tokenizer.json").write_text(tokenizer_text(f"{file}:{pattern}"), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    for text in [*TEXTS, (corpus / "news.txt").read_text()[:20_000], EOS + " in text"]:
        assert ours.encode(text) == reference.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_id == len(ranks) and ours.pad_id == len(ranks) + 1


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models(corpus: Path, tmp_path: Path, kind: str) -> None:
    prefix = tmp_path / "sp"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus / "news.txt"),
        model_prefix=str(prefix),
        vocab_size=500,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    manifest = tokenize([corpus], tmp_path / "out", f"{prefix}.model", workers=1, quiet=True)
    ours = load_tokenizer(tmp_path / "out")
    assert manifest["tokenizer"]["eos_id"] == reference.eos_id() == ours.eos_id
    rng = np.random.default_rng(0)
    lines = (corpus / "news.txt").read_text().splitlines()
    for text in [*TEXTS, *rng.choice(lines, 50)]:
        assert ours.encode(str(text)) == reference.encode(str(text))
    assert ours.decode(ours.encode("The old river.")) == "The old river."


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    for name, content, message in [
        ("a.tiktoken", b"no ranks here\n", "not a file of tiktoken ranks"),
        ("b.tiktoken", b"YQ== 0\n", "does not hold all 256 bytes"),
        ("c.model", b"no model", "not a SentencePiece model"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            tokenizer_text(str(tmp_path / name))
    with pytest.raises(DataError, match="unknown pattern 'p50k'"):
        tokenizer_text(f"{tmp_path / 'a.tiktoken'}:p50k")
    with pytest.raises(DataError, match="no tokenizer at .*none.model"):
        tokenizer_text(str(tmp_path / "none.model"))
