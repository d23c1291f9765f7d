"""A thin wrapper around Hugging Face ``tokenizers``, and training of a byte-level BPE."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_EOS_NAMES = (EOS, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>")
_WORDS = re.compile(r"\d| ?[^ \d\n]+| |\n")
_FREQUENT = re.compile(r" [a-z]{3,}")
_PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|padding|>")


class Tokenizer:
    """A ``tokenizer.json``. Text never turns into special tokens: ``<|endoftext|>`` in a document is plain text.

    path: the file. fingerprint: sha256 of the file. vocab_size: largest id + 1. eos_id: end of a document. pad_id:
    filler (the eos id when the tokenizer has no padding token; padding never carries loss).
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        self.path = str(path)
        data = Path(path).read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{path} is not a Hugging Face tokenizer.json ({error}); give one that tokenizers can load"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(data).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eos = [vocabulary[name] for name in _EOS_NAMES if name in vocabulary]
        if not eos:
            raise DataError(f"{path} has no end-of-document token; add one of {', '.join(_EOS_NAMES)}")
        self.eos_id = eos[0]
        self.pad_id = next((vocabulary[name] for name in _PAD_NAMES if name in vocabulary), self.eos_id)
        self._cache: dict[str, np.ndarray] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_words(self, text: str) -> np.ndarray:
        """:meth:`encode` as an int32 array, word by word from memory: many times faster for text made of few words.

        Same ids as :meth:`encode`: a tokenizer that does not split before spaces and digits is asked directly.
        """
        if not self._splits_words:
            return np.asarray(self.encode(text), dtype=np.int32)
        return np.concatenate([self._word(word) for word in _WORDS.findall(text)])

    def _word(self, word: str) -> np.ndarray:
        ids = self._cache.get(word)
        if ids is None:
            ids = np.asarray(self.encode(word), dtype=np.int32)
            if len(self._cache) < 65536:
                self._cache[word] = ids
        return ids

    @cached_property
    def _splits_words(self) -> bool:
        probe = " One of the numbers for apple, or Pear, is: 48210. (VAR x = VAR y.)\nWhat are they? 7 and 63"
        return self.encode(probe) == np.concatenate([self._word(word) for word in _WORDS.findall(probe)]).tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """:meth:`encode` of many texts, in the library's own threads."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def sentence_ends(self) -> np.ndarray:
        """bool (vocab_size,): the token's text ends a sentence or a line, so a needle may follow it."""
        return np.array([text.endswith((".", "!", "?", "\n")) for text in self._token_texts], dtype=bool)

    @cached_property
    def frequent_words(self) -> tuple[str, ...]:
        """What follows a space and is one token, lower-case letters only: the most frequent words of the text that the
        vocabulary was made from, beginnings of words among them."""
        return tuple(text[1:] for text in self._token_texts if _FREQUENT.fullmatch(text))

    @cached_property
    def _token_texts(self) -> list[str]:
        """Text of every token by itself; of special tokens nothing."""
        return self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=True)

    def __getstate__(self) -> dict:
        return {"path": self.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
        if self.fingerprint != state["fingerprint"]:
            raise DataError(f"{self.path} was changed while in use; restore it or start a new run")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load ``path``: a ``tokenizer.json`` or a folder (also a remote one) that holds one.

    Raises DataError when there is none, when it cannot be read, or when it has no end-of-document token.
    """
    from data_pipeline.remote import RemoteFolder, is_remote

    file = RemoteFolder(str(path)).fetch("tokenizer.json") if is_remote(path) else Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"no tokenizer at {file}; make one with `hsa data tokenize SRC --out DIR --tokenizer bpe:8192` "
            "or give the path of a tokenizer.json"
        )
    return Tokenizer(file)


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE and return the text of its ``tokenizer.json``.

    Every digit is its own token (numbers are read and copied digit by digit), ids 0 and 1 are ``<|endoftext|>`` and
    ``<|pad|>``, any byte string can be encoded. ``vocab_size`` counts all of these; it must be at least 258.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise DataError(
            f"a byte-level BPE needs at least 258 entries (256 bytes and 2 special tokens), not {vocab_size}; "
            "use bpe:512 or more"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend.train_from_iterator(texts, trainer=trainer)
    return backend.to_str()
