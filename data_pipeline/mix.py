"""What a recipe's ``data`` part means: the domains of a mix, opened and checked, and a stage's synthetic options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig, MixEntry, SyntheticConfig
from data_pipeline.errors import DataError
from data_pipeline.permutation import seed_key
from data_pipeline.shards import ShardSet
from data_pipeline.tokenizer import Tokenizer


class Domain:
    """A mix entry with its opened documents: all of a domain of the folder, or those of at least ``min_length`` tokens.

    documents: how many there are. positions: how many of the endless row of epochs the mix may use, None for all.
    """

    def __init__(self, entry: MixEntry, shards: ShardSet, seed: int) -> None:
        names = [d.name for d in shards.domains]
        wanted = entry.domain or (names[0] if len(names) == 1 else entry.name)
        found = shards.domain(wanted)
        self.name, self.weight, self.shards = entry.name, float(entry.weight), shards
        self.first, self.documents = found.first, found.documents
        self.identity = f"{shards.fingerprint[:16]}:{found.name}"
        self.key = seed_key(seed, "documents", entry.name)
        self._chosen: np.ndarray | None = None
        if entry.min_length is not None:
            lengths = shards.index["length"][found.first : found.first + found.documents]
            self._chosen = np.flatnonzero(lengths >= entry.min_length).astype(np.int32)
            self.documents = len(self._chosen)
            self.identity += f":{entry.min_length}+"
            if not self.documents:
                raise DataError(
                    f"no document of domain {found.name} in {shards.path} has {entry.min_length} tokens (min_length of "
                    f"{entry.name}), the longest has {int(lengths.max())}; lower min_length or leave the domain out"
                )
        self.positions = None if entry.max_epochs is None else round(entry.max_epochs * self.documents)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of the index of the documents ``numbers`` (0 .. documents - 1)."""
        return self.first + (numbers if self._chosen is None else self._chosen[numbers])


def mix_entries(data: DataConfig, mix: str | None) -> list[MixEntry]:
    """The entries of ``data.mix`` (None) or ``data.mixes[mix]`` with a weight above 0; DataError when they make no
    sense."""
    if mix is not None and mix not in data.mixes:
        raise DataError(f"no mix {mix!r} in data.mixes; there are {', '.join(data.mixes) or 'none'}")
    where = "data.mix" if mix is None else f"data.mixes.{mix}"
    entries = list(data.mix if mix is None else data.mixes[mix])
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where} has two entries called {name!r}; names must differ")
    for entry in entries:
        if not (math.isfinite(entry.weight) and entry.weight >= 0):
            raise DataError(f"{where}: the weight of {entry.name} must be a number >= 0, not {entry.weight}")
        if entry.max_epochs is not None and not entry.max_epochs > 0:
            raise DataError(f"{where}: max_epochs of {entry.name} must be above 0 or null, not {entry.max_epochs}")
    entries = [entry for entry in entries if entry.weight > 0]
    if not entries:
        raise DataError(f"{where} is empty; it needs at least one entry {{name, path, weight}} with a weight above 0")
    return entries


def open_mixes(data: DataConfig, tokenizer: Tokenizer) -> dict[str, ShardSet]:
    """Open every folder that any mix names (once each): a later stage must not fail on what can be seen now."""
    opened: dict[str, ShardSet] = {}
    identities: dict[str, str] = {}
    for mix in [None, *data.mixes]:
        if mix is None and not data.mix and data.mixes:
            continue
        for entry in mix_entries(data, mix):
            if entry.path not in opened:
                opened[entry.path] = ShardSet(entry.path)
                opened[entry.path].check_tokenizer(tokenizer)
            identity = Domain(entry, opened[entry.path], 0).identity
            if identities.setdefault(entry.name, identity) != identity:
                raise DataError(
                    f"two mixes call different documents {entry.name!r} (other path, domain or min_length); a name "
                    "keeps its position from stage to stage, so give one of them another name and say domain: for it"
                )
    return opened


def merge_synthetic(base: SyntheticConfig, change: SyntheticConfig | dict[str, Any] | None) -> SyntheticConfig:
    """``base`` with the fields of ``change`` replaced (``tasks`` as a whole), typed like the recipe."""
    if change is None or isinstance(change, SyntheticConfig):
        return base if change is None else change
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    change = {str(key): value for key, value in change.items()}
    known = [f.name for f in dataclasses.fields(SyntheticConfig)]
    unknown = sorted(set(change) - set(known))
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r} in the stage's data.synthetic; choose from {', '.join(known)}")
    try:
        if "tasks" in change:  # merging would add them to the recipe's
            base = dataclasses.replace(base, tasks={})
        merged = OmegaConf.structured(base)
        return OmegaConf.to_object(OmegaConf.merge(merged, change))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise DataError(f"the stage's data.synthetic: {str(error).splitlines()[0]}") from error
