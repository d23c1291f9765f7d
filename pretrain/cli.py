"""The command line. Each command's arguments and body live with what it does; this file knows only where.

Exit status: 0 finished; 2 the user's input is wrong (one message, no traceback); 75 stopped cleanly with a checkpoint
and wants to be started again; anything else is a crash.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# command -> (module with add_arguments and main, one line, a real example)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": (
        "pretrain.train",
        "start or resume a training run",
        "hsa train demo optimizer.lr=0.01 --run-dir runs/first",
    ),
    "plan": ("pretrain.plan", "validate a recipe without a GPU and say what it costs", "hsa plan 8b-a1b --gpus 256"),
    "submit": ("slurm.submit", "submit the chain of stages to Slurm", "hsa submit 8b-a1b --dry-run"),
    "status": ("pretrain.status", "where a run stands", "hsa status runs/demo --json"),
    "data": ("data_pipeline.commands", "make and look at token shards", "hsa data inspect data/demo/shards"),
    "eval": ("pretrain.evaluation.commands", "measure a checkpoint", "hsa eval niah runs/demo --lengths 1x,4x,16x"),
    "generate": (
        "pretrain.evaluation.generate",
        "continue a prompt",
        "hsa generate runs/demo --prompt-file prompt.txt",
    ),
    "export": (
        "pretrain.huggingface.export",
        "write a checkpoint as a Hugging Face folder",
        "hsa export runs/demo --out demo-hf",
    ),
    "import": (
        "pretrain.huggingface.importing",
        "make a run directory from a Hugging Face folder",
        "hsa import demo-hf --out runs/imported",
    ),
    "study": (
        "pretrain.study",
        "train and evaluate variants of a recipe, and make one table",
        "hsa study cpu --only baseline window-half",
    ),
    "bench": ("pretrain.bench", "measure speed", "hsa bench kernels --json kernels.json"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s module is imported, so that `hsa --help` answers at once."""
    parser = argparse.ArgumentParser(
        prog="hsa", description="Pretraining stack for HSA-UltraLong language models.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_, example) in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=help_,
            description=help_[0].upper() + help_[1:] + ".",
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        if name == command:
            importlib.import_module(module).add_arguments(sub)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse, with `key=value` overrides anywhere: argparse closes an optional list at the first option behind it."""
    args, rest = parser.parse_known_args(argv)
    stray = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)} (see hsa {args.command} --help)")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Before torch is imported: threads of GNU OpenMP spin for milliseconds when they wait. Beside other work (the data
    # reader, a neighbour's job) that costs most of the speed; no spinning at all costs a third on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    command = next((word for word in argv if word in COMMANDS), None)
    try:
        args = parse(build_parser(command), argv)
        result = int(importlib.import_module(COMMANDS[args.command][0]).main(args) or 0)
        _leave_groups(failed=False)
        return result
    except BrokenPipeError:
        # The reader of stdout went away (`hsa plan ... | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        print(f"hsa: error: {error}", file=sys.stderr)
        _leave_groups(failed=True)
        return int(status)


def _leave_groups(*, failed: bool) -> None:
    """NCCL complains at exit about groups that nobody took down. After a failure other ranks may be gone, and taking
    them down would wait for those."""
    if "parallel.mesh" in sys.modules:
        from parallel import mesh

        if not failed or mesh.world_size() == 1:
            mesh.shutdown()
