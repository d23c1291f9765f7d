"""Training losses of a study's variants side by side, at the same steps.

Variants of one seed read the same sequences at the same step, so their losses compare like with like long before the
end, and a variant that was cut off counts as far as it came. Text is repeated in a long training, so this is no
held-out loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain import metrics_log

LAST = 400  # steps at the end of a stage, or before the step that the shortest variant reached in it


def compare(logs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Mean loss by stage, variant and domain, in nats per token over the last LAST steps that all variants have.

    logs: by variant its ``metrics.jsonl``. A row has stage, steps (first and last), variant, losses by domain (without
    those that some variant's steps lack). No rows with fewer than two logs.
    """
    if len(logs) < 2:
        return []
    records = {name: {record["step"]: record for record in metrics_log.read(path)} for name, path in logs.items()}
    first, *others = records.values()
    stages: dict[str, list[int]] = {}
    for step, record in first.items():
        if all(step in other and other[step]["stage"] == record["stage"] for other in others):
            stages.setdefault(record["stage"], []).append(step)
    rows = []
    for stage, common in stages.items():
        steps = common[-LAST:]
        means = {name: _means([kept[step] for step in steps]) for name, kept in records.items()}
        domains = [domain for domain in means[next(iter(means))] if all(domain in mean for mean in means.values())]
        for name, mean in means.items():
            losses = {domain: mean[domain] for domain in sorted(domains)}
            rows.append({"stage": stage, "steps": [steps[0], steps[-1]], "variant": name, "losses": losses})
    return rows


def _means(records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over the records of every domain's loss, each record that has it counted alike."""
    found: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("loss/") and value is not None:
                found.setdefault(key.removeprefix("loss/"), []).append(value)
    return {domain: sum(values) / len(values) for domain, values in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table per stage, a row per variant, a column per domain."""
    parts = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        same = [row for row in rows if row["stage"] == stage]
        domains = list(same[0]["losses"])
        low, high = same[0]["steps"]
        lines = [[f"{stage}, steps {low:,} to {high:,}", *domains], ["---"] * (1 + len(domains))]
        lines += [[row["variant"], *(f"{row['losses'][domain]:.3f}" for domain in domains)] for row in same]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)
