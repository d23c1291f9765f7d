"""A checkpoint as lm-evaluation-harness sees a model. Importing this needs the package lm-eval (extra `lm-eval`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from pretrain.evaluation.decoding import Sampling
from pretrain.evaluation.requests import RaggedEngine, TextScorer

_MAX_NEW_TOKENS = 256  # where a task does not say


class CheckpointLM(LM):
    """lm-evaluation-harness's interface of a model."""

    def __init__(self, engine: RaggedEngine, tokenizer: Any, *, batch: int = 16) -> None:
        super().__init__()
        self.scorer = TextScorer(engine, tokenizer, batch=batch)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Instances with args (context, continuation) -> (nats, whether it is the greedy continuation)."""
        return self.scorer.loglikelihood([instance.args for instance in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Instances with args (text,) -> nats. Nothing is cut into pieces: the model reads texts of any length."""
        return self.scorer.loglikelihood_of_texts([instance.args[0] for instance in requests])

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Instances with args (context, keywords of generation) -> texts. Requests with equal keywords go together."""
        groups: dict[str, list[int]] = {}
        for number, instance in enumerate(requests):
            groups.setdefault(json.dumps(instance.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            keywords = dict(requests[numbers[0]].args[1])
            stops = keywords.get("until") or []
            found = self.scorer.generate(
                [requests[number].args[0] for number in numbers],
                stops=[stops] if isinstance(stops, str) else list(stops),
                max_new_tokens=int(keywords.get("max_gen_toks", _MAX_NEW_TOKENS)),
                sampling=sampling_of(keywords),
            )
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
        return texts

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own bookkeeping."""
        return str(self.scorer.tokenizer.fingerprint)


def sampling_of(keywords: dict[str, Any]) -> Sampling:
    """The harness's words for sampling; greedy unless do_sample is true or a temperature above 0 is given."""
    temperature = float(keywords.get("temperature") or 0.0)
    if keywords.get("do_sample") and not temperature:
        temperature = 1.0
    if keywords.get("do_sample") is False:
        temperature = 0.0
    return Sampling(
        temperature=temperature,
        top_p=float(keywords.get("top_p") or 1.0),
        top_k=int(keywords.get("top_k") or 0),
        repetition_penalty=float(keywords.get("repetition_penalty") or 1.0),
    )
