"""``hsa data tokenize | merge | inspect | verify``."""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from data_pipeline.array import array_of_environment, merge
from data_pipeline.cleaning import DEDUP, MAX_DOCUMENT_BYTES
from data_pipeline.errors import DataError
from data_pipeline.shards import ShardSet, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands to the parser of ``hsa data``."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="{tokenize,merge,inspect,verify}")

    def command(name: str, help_: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_,
            description=help_,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    make = command(
        "tokenize",
        "Turn text, JSONL or Parquet into token shards with index and manifest.",
        "hsa data tokenize text/ --out shards --tokenizer bpe:2048",
    )
    make.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="text, JSONL(.gz, .zst) or Parquet files, or folders of them; held_out.* in a folder is left out",
    )
    make.add_argument("--out", required=True, metavar="DIR", help="new folder for the shards")
    make.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="a tokenizer.json, or bpe:N to train a byte-level BPE of N entries",
    )
    make.add_argument(
        "--domain", help="domain of all documents (default: a record's own, the JSONL file's name, or text)"
    )
    make.add_argument("--shard-mb", type=float, default=64, metavar="MB", help="text per shard (default 64)")
    make.add_argument("--bpe-mb", type=float, default=32, metavar="MB", help="text to train a BPE on (default 32)")
    make.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    make.add_argument(
        "--strict",
        action="store_true",
        help="stop at a broken record (default: count it, write it to quarantine.jsonl)",
    )
    make.add_argument(
        "--dedup",
        choices=DEDUP,
        default="none",
        help="leave out documents with the text of an earlier one, or nearly so (MinHash; extra: data)",
    )
    make.add_argument("--max-mb", type=float, default=1024, metavar="MB", help="a longer document is broken (1024)")
    index, size = array_of_environment()
    make.add_argument(
        "--array-index", type=int, default=index, metavar="I", help="this task of an array (default: Slurm's)"
    )
    make.add_argument(
        "--array-size", type=int, default=size, metavar="N", help="tasks that share the files (default: Slurm's)"
    )
    make.add_argument("--quiet", action="store_true", help="no progress")

    join = command("merge", "Join what the tasks of a Slurm array tokenized; safe to repeat.", "hsa data merge shards")
    join.add_argument("path", metavar="DIR", help="the --out of the tasks")

    show = command(
        "inspect", "Show domains, counts, lengths and fingerprints of token shards.", "hsa data inspect shards"
    )
    show.add_argument("path", metavar="DIR")
    show.add_argument("--json", action="store_true", help="machine-readable")

    check = command("verify", "Check every byte of token shards: hashes, counts, index, ids.", "hsa data verify shards")
    check.add_argument("path", metavar="DIR")


def main(args: argparse.Namespace) -> int:
    """Run the chosen sub-command; DataError for what the user can repair."""
    if args.data_command == "tokenize":
        from data_pipeline.tokenizing import tokenize

        if args.array_size not in (None, 1) and args.array_index is None:
            raise DataError("--array-size needs --array-index outside of a Slurm array")
        tokenize(
            args.sources,
            args.out,
            args.tokenizer,
            domain=args.domain,
            shard_bytes=int(args.shard_mb * (1 << 20)),
            bpe_bytes=int(args.bpe_mb * (1 << 20)),
            workers=args.workers,
            strict=args.strict,
            dedup=args.dedup,
            max_bytes=min(int(args.max_mb * (1 << 20)), MAX_DOCUMENT_BYTES),
            array=None if args.array_size in (None, 1) else (args.array_index, args.array_size),
            quiet=args.quiet,
        )
    elif args.data_command == "merge":
        merge(args.path)
    elif args.data_command == "inspect":
        summary = inspect(args.path)
        print(json.dumps(summary) if args.json else _tree(summary))
    else:
        started = time.monotonic()
        manifest = verify(args.path)
        print(
            f"{args.path}: {len(manifest['shards'])} shards, {manifest['documents']:,} documents, "
            f"{manifest['tokens']:,} tokens are as written ({time.monotonic() - started:.1f} s)"
        )
    return 0


def inspect(path: str) -> dict:
    """Totals, fingerprints and per domain: documents, tokens, shards, length quantiles and tokens by length class."""
    data = ShardSet(path)
    domains = []
    for domain, entry in zip(data.domains, data.manifest["domains"], strict=True):
        lengths = np.asarray(data.index["length"][domain.first : domain.first + domain.documents], dtype=np.int64)
        quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int).tolist()
        classes = np.floor(np.log2(lengths)).astype(int)
        tokens = np.bincount(classes, weights=lengths).astype(int)
        domains.append(
            {
                "name": domain.name,
                "documents": domain.documents,
                "tokens": domain.tokens,
                "shards": entry["shards"],
                "length_quantiles": dict(zip(("min", "p10", "p50", "p90", "max"), quantiles, strict=True)),
                "tokens_by_length": {str(1 << i): int(n) for i, n in enumerate(tokens) if n},
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
        "domains": domains,
    }


def _tree(summary: dict) -> str:
    tokenizer = summary["tokenizer"]
    lines = [
        f"{summary['path']}  {summary['documents']:,} documents, {summary['tokens']:,} tokens ({summary['dtype']}), "
        f"{summary['shards']} shards, fingerprint {summary['fingerprint'][:12]}",
        f"├─ tokenizer  {tokenizer['vocab_size']:,} entries, eos {tokenizer['eos_id']}, fingerprint "
        f"{tokenizer['fingerprint'][:12]}",
    ]
    for number, domain in enumerate(summary["domains"]):
        last = number == len(summary["domains"]) - 1
        lines.append(
            f"{'└─' if last else '├─'} {domain['name']}  {domain['documents']:,} documents, "
            f"{domain['tokens']:,} tokens ({domain['tokens'] / summary['tokens']:.1%}), {domain['shards']} shards"
        )
        bar = "   " if last else "│  "
        lines.append(f"{bar}  length " + ", ".join(f"{k} {v:,}" for k, v in domain["length_quantiles"].items()))
        for low, tokens in domain["tokens_by_length"].items():
            share = tokens / domain["tokens"]
            lines.append(f"{bar}  {int(low):>10,}+ {'█' * round(30 * share):<30} {100 * share:5.1f} % of the tokens")
    return "\n".join(lines)
