"""The ``data`` part of a recipe, as structured configs (typed by OmegaConf, usable as plain dataclasses)."""

from __future__ import annotations

from dataclasses import dataclass, field

TASKS = (
    "niah_single",
    "niah_multikey",
    "niah_multiquery",
    "variable_tracking",
    "copy",
    "frequent_words",
    "recall",
    "niah_needles",
)
"""Synthetic tasks in the order of their domain ids (which follow the ids of the mix's domains)."""

TRAINING_ONLY = ("recall",)
"""Tasks that evaluation does not ask: their questions are not all at the end."""


DEFAULT_TASKS = {
    "niah_single": 0.3,
    "niah_multikey": 0.2,
    "niah_multiquery": 0.15,
    "variable_tracking": 0.15,
    "copy": 0.2,
}
"""Relative frequencies when a recipe gives none (it would not be a default of the field: OmegaConf merges dicts)."""


@dataclass
class MixEntry:
    """One domain of the mix.

    name: label in metrics and in the saved position. path: folder written by ``hsa data tokenize``, also behind
    ``http(s)://`` or ``pipe:command {file}`` (see ``remote.py``). weight: share of
    the TOKENS, relative to the other entries. domain: which domain of the folder; null takes the one called ``name``,
    or the only one there is; ``"*"`` takes all of them. max_epochs: a lane that has read its part of so many epochs
    leaves the domain out, and its share goes to the others; null repeats without end. min_length: only documents of at
    least so many tokens.
    """

    name: str = "???"
    path: str = "???"
    weight: float = 1.0
    domain: str | None = None
    max_epochs: float | None = None
    min_length: int | None = None


@dataclass
class SyntheticConfig:
    """Synthetic long-context samples and the loss weights.

    rate: share of the sequences that are synthetic (exact over time in every lane). tasks: relative frequency by task
    name, empty for DEFAULT_TASKS. min_length: null makes one sample per sequence; a number packs samples of
    log-uniform lengths from there up to the context (in tokens, whole chunks; a task that does not fit is drawn
    again). digits: length of a number. keys: needles of ``niah_multikey`` and ``niah_multiquery``. queries: how many
    of them ``niah_multiquery`` asks for. hops: assignments after the first in ``variable_tracking``. copy_random:
    share of ``copy`` samples made of random tokens instead of text. templates: wordings, see ``wordings.py``: ``train``
    (three) or ``wide`` (a grammar with kinds of keys and values, which ignores ``digits``). frequent_names: share of
    the keys and of the names in chains of ``wide`` that are words frequent in the text: many places name them and say
    nothing of them, as in a far longer text. text_weight, copy_weight, answer_weight: loss weight of natural
    text (haystacks included), of the copied half, of answers. evidence_weight: weight, at every token of an answer, of
    the loss that asks attention for the chunk that holds it (``parallel/evidence.py``); 0 is none. evidence_context: as
    if the sequence had so many tokens; null: as it is.
    """

    rate: float = 0.01
    tasks: dict[str, float] = field(default_factory=dict)
    text_weight: float = 1.0
    copy_weight: float = 1.0
    answer_weight: float = 1.0
    evidence_weight: float = 0.0
    evidence_context: int | None = None
    min_length: int | None = None
    digits: int = 4
    keys: int = 4
    queries: int = 2
    hops: int = 4
    copy_random: float = 0.5
    templates: str = "train"
    frequent_names: float = 0.0


@dataclass
class DataConfig:
    """Everything about data in a recipe.

    tokenizer: a ``tokenizer.json`` or the folder that holds it. mix: the default mix; mixes: named mixes that a stage
    can choose. held_out: text or JSONL file for perplexity, never trained on. lanes: number of lanes N, constant for
    the run. prefetch: batches that a reader process prepares ahead; 0 reads inside the training process. readers: such
    processes per rank, which share its lanes; batches do not depend on their number. packing: ``split`` fills a
    sequence with what comes next, ``best_fit`` with the document that fits best among ``packing_buffer`` ones per lane,
    so that fewer are cut. unreadable: ``stop`` at a document that cannot be read, or ``skip`` it; it is named and
    counted.
    """

    tokenizer: str = "???"
    mix: list[MixEntry] = field(default_factory=list)
    mixes: dict[str, list[MixEntry]] = field(default_factory=dict)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    held_out: str | None = None
    lanes: int = 8
    prefetch: int = 2
    readers: int = 1
    packing: str = "split"
    packing_buffer: int = 32
    unreadable: str = "stop"
