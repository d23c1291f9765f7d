"""``hsa data tokenize | merge | inspect | verify``."""

from __future__ import annotations

import argparse
import json
import time

from data_pipeline.array import array_of_environment, merge
from data_pipeline.cleaning import DEDUP, MAX_DOCUMENT_BYTES
from data_pipeline.errors import DataError
from data_pipeline.inspecting import find, inspect, inspect_recipe, picture, tree
from data_pipeline.shards import verify


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
        help="tokenizer.json, SentencePiece .model, .tiktoken ranks, or bpe:N to train a byte-level BPE of N entries",
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
        "inspect",
        "Show domains, counts, lengths and fingerprints of token shards, or a recipe's mixes with shares and epochs.",
        "hsa data inspect shards\n  hsa data inspect demo --picture mix.png",
    )
    show.add_argument("path", metavar="DIR|RECIPE", help="a folder of shards, a recipe's file, or a shipped one's name")
    show.add_argument("--json", action="store_true", help="machine-readable")
    show.add_argument("--picture", metavar="FILE", help="write a picture of lengths and epochs (PNG)")

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
        path, recipe = find(args.path)
        summary = inspect_recipe(path) if recipe else inspect(path)
        print(json.dumps(summary) if args.json else tree(summary))
        if missing := summary.get("missing"):
            raise DataError(
                f"the data of {path} is not complete, missing: {', '.join(missing)}; make shards with `hsa data "
                "tokenize SRC --out DIR --tokenizer T` (the demo's: `make demo`), or give other paths in the recipe"
            )
        if args.picture:
            picture(summary, args.picture)
    else:
        started = time.monotonic()
        manifest = verify(args.path)
        print(
            f"{args.path}: {len(manifest['shards'])} shards, {manifest['documents']:,} documents, "
            f"{manifest['tokens']:,} tokens are as written ({time.monotonic() - started:.1f} s)"
        )
    return 0
