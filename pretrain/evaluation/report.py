"""Results as tables for people, JSON files for programs, and pictures in the tracking store."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pretrain.evaluation.ppl import Mean, PplResult
from pretrain.evaluation.retrieval import TaskResult
from pretrain.evaluation.ruler import RulerResult
from pretrain.evaluation.tally import Tally
from pretrain.evaluation.units import format_length
from pretrain.run_dir import read_json, write_json


def niah_table(result: TaskResult) -> str:
    """Accuracy in %, one row per depth (or distance), one column per length; last rows: all, with the 95 % interval."""
    by_depth = bool(result.depths)
    cells = {(cell.depth if by_depth else cell.distance, cell.length): cell.tally for cell in result.cells}
    rows = [["depth" if by_depth else "distance", *map(format_length, result.lengths)]]
    for place in dict.fromkeys(place for place, _ in cells):
        name = f"{100 * place:.0f} %" if by_depth and place is not None else format_length(int(place or 0))
        rows.append([name, *(_percent(cells[place, length]) for length in result.lengths)])
    totals = result.by_length()
    if len(rows) > 2:
        rows.append(["all", *map(_percent, totals.values())])
    rows.append(["95 %", *map(_interval, totals.values())])
    head = f"{result.task}: exact answers in %, n = {result.samples} per cell, {result.templates} wording"
    return _table(rows, head, _repeats(result))


def ruler_table(result: RulerResult) -> str:
    """Accuracy in %, one row per task, one column per length, with 95 % intervals."""
    results = list(result.tasks.values())
    rows = [["task", *map(format_length, results[0].lengths)]]
    for task in results:
        rows.append([task.task, *(f"{_percent(t)} {_interval(t)}" for t in task.by_length().values())])
    head = f"exact answers in %, n = {results[0].samples} per cell, {results[0].templates} wording"
    return _table(rows, head, _repeats(results[0]))


def joined_table(trainings: Mapping[str, Mapping[str, TaskResult]], joined: Mapping[str, TaskResult]) -> str:
    """Accuracy in % by length: per task a row for every training, one for all questions of several, one for the 95 %
    interval.

    trainings: results by training, then by task; joined: all of them by task.
    """
    first = next(iter(joined.values()))
    rows = [["task", "training", "n", *map(format_length, first.lengths)]]
    for task, result in joined.items():
        totals = result.by_length()
        each = {name: tasks[task].by_length() for name, tasks in trainings.items()}
        if len(each) > 1:
            each["all"] = totals
        for name, tallies in each.items():
            counts = sorted({tally.n for tally in tallies.values()})
            count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
            rows.append([task, name, count, *map(_percent, tallies.values())])
            task = ""
        rows.append(["", "95 %", "", *map(_interval, totals.values())])
    return _table(rows, f"exact answers in %, {first.templates} wording", _repeats(first))


def ppl_table(result: PplResult) -> str:
    """Perplexity with its 95 % interval and bits per byte, one row per context, beside the unigram model's.

    The last column is the perplexity of the sequences' second half, or with ``last`` the perplexity of the same tokens
    against the reference context's, with the interval of their differences.
    """
    compared = None if result.reference is None else format_length(result.reference)
    tail_name = "second half" if compared is None else f"against {compared}"
    rows = [["context", "sequences", "nats/token", "perplexity", "95 %", "bits/byte", tail_name]]
    for item in result.contexts:
        mean = item.overall
        spread = "" if math.isnan(mean.low) else f"{math.exp(mean.low):.2f}-{math.exp(mean.high):.2f}"
        if item.difference is not None:
            tail = "" if item.context == result.reference else _against(item.difference)
        else:
            late = [bucket.mean for bucket in item.buckets if bucket.start >= item.context // 2] or [mean]
            tail = f"{math.exp(sum(m.nll * m.n for m in late) / sum(m.n for m in late)):.2f}"
        rows.append(
            [
                format_length(item.context),
                str(item.sequences),
                f"{mean.nll:.4f}",
                f"{mean.perplexity:.2f}",
                spread,
                f"{item.bits_per_byte:.3f}",
                tail,
            ]
        )
    notes = [f"left out {format_length(context)}: {why}" for context, why in result.left_out.items()]
    if result.unigram_nll is not None:
        notes.insert(
            0, f"unigram model: {result.unigram_nll:.4f} nats/token, perplexity {math.exp(result.unigram_nll):.1f}"
        )
    same = "" if result.last is None else f", the same {result.last} tokens at the end of every sequence"
    return _table(rows, f"held-out text of {result.text_tokens} tokens{same}", *notes)


def _against(difference: Mean) -> str:
    """Perplexity against another's in %, with its 95 % interval: ``+1.2 % [+0.8, +1.6]``."""
    percent = [100 * math.expm1(nats) for nats in (difference.nll, difference.low, difference.high)]
    if math.isnan(percent[1]):
        return f"{percent[0]:+.1f} %"
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*percent)


def _percent(tally: Tally) -> str:
    return f"{100 * tally.accuracy:.1f}"


def _interval(tally: Tally) -> str:
    low, high = tally.interval
    return f"[{100 * low:.0f}-{100 * high:.0f}]"


def _repeats(result: TaskResult) -> str:
    tiled = [length for length in result.lengths if length > result.haystack_tokens]
    if not tiled:
        return ""
    return (
        f"held-out text has {result.haystack_tokens} tokens and was repeated at {', '.join(map(format_length, tiled))}"
    )


def _table(rows: Sequence[Sequence[str]], head: str, *notes: str) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([head, *lines, *(note for note in notes if note)])


def save_json(value: dict, path: Path) -> Path:
    """Write a result, whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)
    return path


def log_pictures(run_dir: Path, pictures: Sequence[Path], say: Callable[[str], None]) -> bool:
    """Send pictures to the run's MLflow store as artifacts under ``eval``; whether they arrived.

    A run that is not tracked is left alone. A store that is away, moved or broken costs one warning, never the
    evaluation.
    """
    run_file = run_dir / "run.json"
    if not run_file.is_file():
        return False
    try:
        run = read_json(run_file)
        ids = run.get("mlflow") or {}
        if not ids.get("run_id"):
            return False
        from pretrain.mlflow_store import Store, sqlite_path

        database = sqlite_path(ids["uri"])
        if database is not None and not database.exists():  # connecting would make an empty store in its place
            raise FileNotFoundError(f"{database} is not there")
        store = Store(ids["uri"], ids["experiment"], run["run_id"])
        store.connect()
        for picture in pictures:
            store.send_file(ids["run_id"], picture, "eval")
    except Exception as error:  # whatever the store, its driver or the network raise: the results are on disk already
        reason = (str(error).splitlines() or [""])[0]
        say(f"warning: pictures were not logged to the tracking store ({type(error).__name__}: {reason})"[:300])
        return False
    return True
