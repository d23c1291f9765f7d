"""`hsa bench`: speed, each figure beside its baseline of the same run."""

from __future__ import annotations

import argparse
import importlib

# name -> (module with add_arguments and main, one line)
BENCHES = {
    "data": ("data_pipeline.bench", "reading, opening, resuming and tokenizing against plain loops and libraries"),
    "kernels": ("hsa_kernels.bench.kernels", "attention operators against cuDNN, FlexAttention and the reference"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    subparsers = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, (module, help_) in BENCHES.items():
        sub = subparsers.add_parser(
            name, help=help_, description=help_, epilog=f"example: hsa bench {name} --json out.json"
        )
        importlib.import_module(module).add_arguments(sub)


def main(args: argparse.Namespace) -> int:
    """Run one benchmark."""
    return int(importlib.import_module(BENCHES[args.bench][0]).main(args) or 0)
