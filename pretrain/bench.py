"""`hsa bench`: speed, each figure beside its baseline of the same run."""

from __future__ import annotations

import argparse
import importlib

# name -> (module, its function that adds arguments, its function that runs, one line)
BENCHES = {
    "data": (
        "data_pipeline.bench",
        "add_arguments",
        "main",
        "reading, opening, resuming and tokenizing against plain loops and libraries",
    ),
    "kernels": (
        "hsa_kernels.bench.kernels",
        "add_arguments",
        "main",
        "attention operators against cuDNN, FlexAttention and the reference",
    ),
    "step": (
        "pretrain.bench_training",
        "add_step_arguments",
        "step",
        "a training step of a recipe on random tokens: tokens/s, MFU, time and memory by part, options as ratios",
    ),
    "checkpoint": (
        "pretrain.bench_training",
        "add_checkpoint_arguments",
        "checkpoint",
        "saving, loading and verifying a recipe's checkpoint: seconds and GB/s",
    ),
    "prefill": (
        "pretrain.bench_inference",
        "add_prefill_arguments",
        "prefill",
        "seconds per million tokens of a prompt, against the full computation and dense attention's floor",
    ),
    "decode": (
        "pretrain.bench_inference",
        "add_decode_arguments",
        "decode",
        "generated tokens per second behind long contexts, against the floor of reading the landmarks",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    subparsers = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, (module, arguments, _, help_) in BENCHES.items():
        sub = subparsers.add_parser(
            name, help=help_, description=help_, epilog=f"example: hsa bench {name} --json out.json"
        )
        getattr(importlib.import_module(module), arguments)(sub)


def main(args: argparse.Namespace) -> int:
    """Run one benchmark."""
    module, _, function, _ = BENCHES[args.bench]
    return int(getattr(importlib.import_module(module), function)(args) or 0)
