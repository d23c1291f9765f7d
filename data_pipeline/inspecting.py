"""``hsa data inspect``: a folder of shards, or the mixes of a recipe, as a tree, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig, MixEntry
from data_pipeline.errors import DataError
from data_pipeline.mix import Domain, mix_entries, open_mixes
from data_pipeline.remote import is_remote
from data_pipeline.shards import ShardSet
from data_pipeline.tokenizer import load_tokenizer


def inspect(path: str | Path) -> dict[str, Any]:
    """Totals, fingerprints and per domain: documents, tokens, shards, length quantiles and tokens by length class."""
    data = ShardSet(path)
    domains = []
    for domain, entry in zip(data.domains, data.manifest["domains"], strict=True):
        lengths = np.asarray(data.index["length"][domain.first : domain.first + domain.documents], dtype=np.int64)
        domains.append(
            {
                "name": domain.name,
                "documents": domain.documents,
                "tokens": domain.tokens,
                "shards": entry["shards"],
                **_lengths(lengths),
            }
        )
    return {
        "path": str(path),
        "dtype": data.dtype_name,
        "documents": data.documents,
        "tokens": data.tokens,
        "shards": len(data.shard_files),
        "fingerprint": data.fingerprint,
        "tokenizer": data.manifest["tokenizer"],
        "left_out": data.manifest.get("left_out", {}),
        "domains": domains,
    }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int).tolist()
    tokens = np.bincount(np.floor(np.log2(lengths)).astype(int), weights=lengths).astype(int)
    return {
        "length_quantiles": dict(zip(("min", "p10", "p50", "p90", "max"), quantiles, strict=True)),
        "tokens_by_length": {str(1 << i): int(n) for i, n in enumerate(tokens) if n},
    }


def find(name: str) -> tuple[Path | str, bool]:
    """What ``hsa data inspect NAME`` means, and whether it is a recipe: a recipe's file, a folder (or URL) of shards,
    or the name of a shipped recipe, in this order."""
    if name.endswith((".yaml", ".yml")):
        return name, True
    shipped = {file.stem: file for file in (Path(__file__).parents[1] / "recipes").glob("*.yaml")}
    if name in shipped and not (Path(name) / "manifest.json").is_file():
        return shipped[name], True
    if is_remote(name) or Path(name).exists():
        return name, False
    raise DataError(
        f"nothing to inspect at {name}: there is no such folder of shards (made with `hsa data tokenize`) or recipe, "
        f"and the recipes shipped are {', '.join(sorted(shipped))}"
    )


def inspect_recipe(path: str | Path) -> dict[str, Any]:
    """Every mix of a recipe (YAML) with the stages that draw from it, and per domain: share of the tokens, tokens,
    epochs over all stages, cap, fingerprint, lengths.

    Epochs assume that stages run to ``until.tokens`` (or ``max_tokens``) and that every sample reads its length of
    text; self-copies read less. Without the recipe's data there are only names, paths, shares and tokens, and
    ``missing`` lists what is not there.
    """
    from omegaconf import OmegaConf

    try:
        raw: Any = OmegaConf.load(path)
        plain: Any = OmegaConf.to_container(raw)
        data: DataConfig = OmegaConf.to_object(  # type: ignore[assignment]
            OmegaConf.merge(OmegaConf.structured(DataConfig), raw["data"])
        )
        stages = [_stage(stage) for stage in plain["stages"]]
    except Exception as error:  # YAML, OmegaConf and a missing key each have their own
        raise DataError(f"{path} has no readable data part ({error}); give a folder of shards or a recipe") from error
    missing = _missing(data)
    opened = {} if missing else open_mixes(data, load_tokenizer(data.tokenizer))
    total: dict[str, float] = {}
    mixes: list[dict[str, Any]] = []
    for mix in [None, *data.mixes]:
        if mix is None and not data.mix:
            continue
        users = [stage for stage in stages if stage["mix"] == mix]
        tokens = sum(stage["tokens"] for stage in users)
        entries = mix_entries(data, mix)
        weights = sum(entry.weight for entry in entries)
        domains = []
        for entry in entries:
            share = entry.weight / weights
            facts = {"name": entry.name, "path": entry.path, "share": share, "tokens": share * tokens}
            if not missing:
                facts |= _facts(entry, opened[entry.path], share * tokens)
                total[entry.name] = total.get(entry.name, 0.0) + facts["epochs"]
            domains.append(facts)
        mixes.append({"name": mix, "stages": [s["name"] for s in users], "tokens": tokens, "domains": domains})
    summary = {"path": str(path), "lanes": data.lanes, "packing": data.packing, "epochs": total, "mixes": mixes}
    return {**summary, "missing": missing}


def _facts(entry: MixEntry, shards: ShardSet, tokens: float) -> dict[str, Any]:
    """What the shards say of a mix entry that is to give ``tokens`` tokens."""
    domain = Domain(entry, shards, 0)
    lengths = np.asarray(shards.index["length"][domain.rows(np.arange(domain.documents))], np.int64)
    return {
        "documents": domain.documents,
        "tokens_per_epoch": int(lengths.sum()),
        "epochs": tokens / float(lengths.sum()),
        "max_epochs": entry.max_epochs,
        "min_length": entry.min_length,
        "fingerprint": domain.identity,
        **_lengths(lengths),
    }


def _missing(data: DataConfig) -> list[str]:
    """Folders of shards, and the tokenizer, that a recipe names and that are not there."""
    paths = [entry.path for entries in (data.mix, *data.mixes.values()) for entry in entries]
    folders = [
        path for path in dict.fromkeys(paths) if not is_remote(path) and not (Path(path) / "manifest.json").is_file()
    ]
    tokenizer = data.tokenizer
    return folders + ([] if is_remote(tokenizer) or Path(tokenizer).exists() else [tokenizer])


def _stage(stage: Any) -> dict[str, Any]:
    until = stage.get("until") or {}
    return {
        "name": str(stage.get("name")),
        "mix": (stage.get("data") or {}).get("mix"),
        "tokens": float(until.get("tokens") or until.get("max_tokens") or 0),
    }


def tree(summary: dict[str, Any]) -> str:
    """The text of :func:`inspect` or :func:`inspect_recipe`."""
    return "\n".join(_recipe_lines(summary) if "mixes" in summary else _shard_lines(summary))


def _shard_lines(summary: dict[str, Any]) -> Iterator[str]:
    tokenizer = summary["tokenizer"]
    yield (
        f"{summary['path']}  {summary['documents']:,} documents, {summary['tokens']:,} tokens ({summary['dtype']}), "
        f"{summary['shards']} shards, fingerprint {summary['fingerprint'][:12]}"
    )
    yield (
        f"├─ tokenizer  {tokenizer['vocab_size']:,} entries, eos {tokenizer['eos_id']}, fingerprint "
        f"{tokenizer['fingerprint'][:12]}"
    )
    if summary["left_out"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(summary["left_out"].items()))
        yield f"├─ left out   {reasons}; see quarantine.jsonl"
    for number, domain in enumerate(summary["domains"]):
        last = number == len(summary["domains"]) - 1
        yield (
            f"{'└─' if last else '├─'} {domain['name']}  {domain['documents']:,} documents, "
            f"{domain['tokens']:,} tokens ({domain['tokens'] / summary['tokens']:.1%}), {domain['shards']} shards"
        )
        yield from _histogram(domain, domain["tokens"], "   " if last else "│  ")


def _recipe_lines(summary: dict[str, Any]) -> Iterator[str]:
    yield f"{summary['path']}  {summary['lanes']} lanes, packing {summary['packing']}"
    for number, mix in enumerate(summary["mixes"]):
        last = number == len(summary["mixes"]) - 1
        stages = ", ".join(mix["stages"]) or "no stage"
        yield f"{'└─' if last else '├─'} {mix['name'] or 'default mix'}  {stages}: {mix['tokens']:,.0f} tokens"
        bar = "   " if last else "│  "
        for count, domain in enumerate(mix["domains"]):
            end = count == len(mix["domains"]) - 1
            facts = f"{domain['share']:.1%} = {domain['tokens']:,.0f} tokens"
            if summary["missing"]:
                gone = ", not there" if domain["path"] in summary["missing"] else ""
                yield f"{bar}{'└─' if end else '├─'} {domain['name']}  {facts} from {domain['path']}{gone}"
                continue
            facts += f", {domain['epochs']:.3g} epochs of "
            facts += f"{domain['tokens_per_epoch']:,} in {domain['documents']:,} documents"
            if domain["min_length"]:
                facts += f" of {domain['min_length']:,}+ tokens"
            if domain["max_epochs"] is not None:
                facts += f", at most {domain['max_epochs']:g}"
                if domain["epochs"] > domain["max_epochs"]:
                    facts += " (reached: the rest of its share goes to the others)"
            yield f"{bar}{'└─' if end else '├─'} {domain['name']}  {facts}, fingerprint {domain['fingerprint'][:12]}"
            yield from _histogram(domain, domain["tokens_per_epoch"], bar + ("   " if end else "│  "))
    if not summary["missing"]:
        epochs = ", ".join(f"{name} {n:.3g}" for name, n in summary["epochs"].items())
        yield f"epochs over all stages: {epochs}"


def _histogram(domain: dict[str, Any], total: int, bar: str) -> Iterator[str]:
    yield f"{bar}  length " + ", ".join(f"{k} {v:,}" for k, v in domain["length_quantiles"].items())
    for low, tokens in domain["tokens_by_length"].items():
        share = tokens / total
        yield f"{bar}  {int(low):>10,}+ {'█' * round(30 * share):<30} {100 * share:5.1f} % of the tokens"


def picture(summary: dict[str, Any], file: str | Path) -> None:
    """Write a PNG: tokens by document length for every domain, and for a recipe the epochs of every domain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = summary.get("mixes") or [{"name": "shards", "domains": summary["domains"]}]
    epochs = summary.get("epochs")
    figure = Figure(figsize=(5 * (len(groups) + bool(epochs)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups) + bool(epochs), squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=False):
        for domain in group["domains"]:
            lows = [int(low) for low in domain["tokens_by_length"]]
            axis.plot(lows, list(domain["tokens_by_length"].values()), marker="o", label=domain["name"])
        axis.set(xscale="log", yscale="log", xlabel="document length (tokens, from)", ylabel="tokens")
        axis.set_title(group["name"] or "default mix")
        axis.legend(fontsize="small")
    if epochs:
        axes[-1].barh(list(epochs), list(epochs.values()))
        axes[-1].set(xlabel="epochs over all stages")
        axes[-1].axvline(1.0, color="grey", linewidth=1)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the picture {file} ({error}); give the path of a .png") from error
