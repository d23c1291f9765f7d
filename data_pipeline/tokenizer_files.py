"""Other tokenizer formats become a ``tokenizer.json``, the one format that everything behind it reads.

tiktoken ranks (``.tiktoken``: base64 token and rank per line)
SentencePiece models (``.model``: unigram or BPE)
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import EOS, PAD, load_tokenizer

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    ),
}
"""How text is cut before ranks are applied; a ranks file does not say. Named by OpenAI's encodings that use them."""
_PROBE = "The year 1984, isn't it?\n\n  Two  spaces; Zürich, 漢字 🙂 x=3.14\tdef f(a_b):\r\n    return [a_b]\n"


def tokenizer_text(choice: str) -> str:
    """The text of a ``tokenizer.json`` for ``choice``.

    choice: a ``tokenizer.json`` (or its folder), a ``.model`` of SentencePiece, or a ``.tiktoken`` file, with
    ``:gpt2`` or ``:cl100k`` behind it for the pattern (default cl100k).
    """
    path, _, pattern = choice.partition(".tiktoken:") if ".tiktoken:" in choice else (choice, "", "")
    if pattern:
        path += ".tiktoken"
    if path.endswith(".tiktoken"):
        return _of_tiktoken(_existing(path), pattern or "cl100k")
    if path.endswith(".model"):
        return _of_sentencepiece(_existing(path))
    return Path(load_tokenizer(path).path).read_text(encoding="utf-8")


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise DataError(f"no tokenizer at {path}; correct --tokenizer")
    return Path(path)


def _of_tiktoken(file: Path, pattern: str) -> str:
    """Byte-level BPE with the ranks as ids, behind them end of document and padding.

    A merge is written for every way to split a token into two tokens, in the order of the merged token's rank: then the
    pair with the lowest rank is merged first, as tiktoken does.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if pattern not in PATTERNS:
        raise DataError(f"unknown pattern {pattern!r} for {file}; choose from {', '.join(PATTERNS)}")
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{file} is not a file of tiktoken ranks ({error}); copy it again") from error
    if len(ranks) < 256 or any(bytes([b]) not in ranks for b in range(256)):
        raise DataError(f"{file} does not hold all 256 bytes; it is no byte-level vocabulary, or truncated")
    character = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(character[b] for b in token)

    merges = []
    for token, rank in ranks.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(rank, first, second, (text(a), text(b))) for first, second, a, b in known]
    merges.sort()
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[m[3] for m in merges], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    return backend.to_str()


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def _of_sentencepiece(file: Path) -> str:
    """The model's pieces under the same ids; compared with SentencePiece itself on a text with many kinds of
    characters before it is used."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as error:
        raise DataError(
            f'reading {file} needs the packages sentencepiece and protobuf: pip install "hsa-ultralong[data]"'
        ) from error
    from tokenizers import Tokenizer

    model = proto.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(file.read_bytes())
        original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # protobuf's and SentencePiece's own
        raise DataError(f"{file} is not a SentencePiece model ({error}); copy it again") from error
    text = json.dumps(_sentencepiece_json(model), ensure_ascii=False)
    backend = Tokenizer.from_str(text)
    for probe in (_PROBE, *(line for line in _PROBE.splitlines() if line.strip())):
        if backend.encode(probe, add_special_tokens=False).ids != original.encode(probe):
            raise DataError(
                f"{file} has a normalisation or model type that a tokenizer.json cannot express exactly: its ids "
                "differ from SentencePiece's; train one with byte_fallback and the identity normalisation"
            )
    return text


def _sentencepiece_json(model: Any) -> dict[str, Any]:
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    unigram = model.trainer_spec.model_type == 1
    unknown = kinds.index(2)
    fallback = bool(model.trainer_spec.byte_fallback)
    normalizers: list[dict[str, Any]] = []
    if model.normalizer_spec.precompiled_charsmap:
        charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.normalizer_spec.remove_extra_whitespaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.normalizer_spec.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": "▁"})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    body: dict[str, Any]
    if unigram:
        body = {"type": "Unigram", "unk_id": unknown, "vocab": [list(p) for p in pieces], "byte_fallback": fallback}
    else:
        ids = {piece: number for number, (piece, _) in enumerate(pieces)}
        merges = []
        for number, (piece, _) in enumerate(pieces):
            if kinds[number] == 1:
                pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
                merges += [(number, ids[a], ids[b], [a, b]) for a, b in pairs if a in ids and b in ids]
        merges.sort()
        body = {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unknown][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": fallback,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [m[3] for m in merges],
        }
    special = [number for number, kind in enumerate(kinds) if kind in (2, 3)]  # unknown and control pieces
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prefix = (
        [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.normalizer_spec.add_dummy_prefix else []
    )
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *prefix,
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": pieces[n][0], **flags} for n in special],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": body,
    }
