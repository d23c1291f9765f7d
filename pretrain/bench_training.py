"""`hsa bench step` and `hsa bench checkpoint`: a training step on random tokens, and a checkpoint's saving and loading.

Both run on one rank or under torchrun, like `hsa train`, and need no data. Variants are recipe overrides, timed in
turns with the recipe as it is, so that a ratio compares neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import PackedBatch
from data_pipeline.evidence import NONE, PLACES
from parallel import mesh
from pretrain.errors import RecipeError
from pretrain.recipe import Recipe, StageConfig, effective_micro_batch, load_recipe
from pretrain.topology import check_machine, check_stage


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    parser.add_argument("--json", metavar="FILE", help="write all figures and the machine to FILE")


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hsa bench step`."""
    _common(parser)
    parser.epilog = "example: hsa bench step demo --against recompute=full --against compute.grouped_experts=off"
    parser.add_argument("--stage", help="stage whose sizes are used (default: the first)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant (default 5)")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="KEY=VALUE[,KEY=VALUE]",
        help="overrides of one more variant; its time is given as a ratio to the recipe's. Repeatable",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hsa bench checkpoint`."""
    _common(parser)
    parser.epilog = "example: hsa bench checkpoint demo --dir /scratch"
    parser.add_argument("--dir", type=Path, help="existing directory to write into (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3, help="saves and loads; the median counts (default 3)")


# ---------------------------------------------------------------------------------------------------------------------
# step


def step(args: argparse.Namespace) -> int:
    """Run `hsa bench step`."""
    names = ["as it is", *args.against]
    recipes = [
        load_recipe(args.recipe, [*args.overrides, *(extra.split(",") if extra else [])]).recipe
        for extra in ["", *args.against]
    ]
    stages = [_stage(recipe, args.stage) for recipe in recipes]
    for recipe, stage, name in zip(recipes, stages, names, strict=True):
        if recipe.parallel != recipes[0].parallel or recipe.device != recipes[0].device:
            raise RecipeError(f"--against {name}: variants share one layout and device; start another run for it")
        check_stage(recipe, stage, mesh.launched_world_size())
        check_machine(recipe)
    device = mesh.initialize(recipes[0].parallel, recipes[0].device, seed=recipes[0].seed)
    try:
        variants = [_Variant(recipe, stage, device) for recipe, stage in zip(recipes, stages, strict=True)]
        for variant in variants:  # compiles, allocates
            variant.run(0)
        seconds: list[list[float]] = [[] for _ in variants]
        for number in range(args.steps):
            for times, variant in zip(seconds, variants, strict=True):
                times.append(variant.run(number))
        rows = [
            _step_row(variant, times, seconds[0], name)
            for variant, times, name in zip(variants, seconds, names, strict=True)
        ]
        _report(args, device, {"recipe": args.recipe, "stage": stages[0].name, "variants": rows}, _step_lines(rows))
    finally:
        mesh.shutdown()
    return 0


def _stage(recipe: Recipe, name: str | None) -> StageConfig:
    for stage in recipe.stages:
        if name in (None, stage.name):
            return stage
    raise RecipeError(f"--stage {name}: the recipe's stages are {', '.join(s.name for s in recipe.stages)}")


class _Variant:
    """One recipe's model and its step on random tokens."""

    def __init__(self, recipe: Recipe, stage: StageConfig, device: torch.device) -> None:
        from pretrain.assembly import assemble
        from pretrain.train_step import TrainStep

        self.recipe, self.stage, self.device = recipe, stage, device
        self.models, chunks, self.optimizer = assemble(recipe, device, deterministic=False)
        for model in self.models:
            model.set_schedule(window=stage.window, hsa_window=stage.hsa_window, top_k=stage.top_k)
        self.step = TrainStep(chunks, self.optimizer, ["random"], device)
        self.micro_batch = effective_micro_batch(recipe, stage, mesh.data_size())
        self.tokens = recipe.stage_batch(stage) * stage.context
        self.peak = 0

    def run(self, number: int) -> float:
        """Seconds of one step, the drawing of its tokens not counted."""
        batch = self.batch(number)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with _Seconds(self.device) as seconds:
            self.step(batch, self.micro_batch, wants_stop=False)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
        return seconds.value

    def batch(self, number: int) -> PackedBatch:
        """This data-parallel rank's share of a batch of random tokens, one document per sequence."""
        shape = (self.recipe.stage_batch(self.stage) // mesh.data_size(), self.stage.context)
        generator = torch.Generator().manual_seed(1000 * number + mesh.data_rank())
        tokens = torch.randint(0, self.recipe.model.vocab_size, shape, generator=generator)
        return PackedBatch(
            tokens=tokens,
            labels=tokens.roll(-1, 1),
            loss_weights=torch.ones(shape),
            documents=torch.zeros(shape, dtype=torch.int32),
            domains=torch.zeros(shape, dtype=torch.int16),
            evidence=torch.full((*shape, PLACES), NONE, dtype=torch.int32),
        )

    def split(self) -> dict[str, float]:
        """Seconds of one more step by part, the device waited for between the parts."""
        found = {"data": 0.0, "forward": 0.0, "optimizer": 0.0}

        def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with _Seconds(self.device) as seconds:
                    result = function(*args, **kwargs)
                found[part] += seconds.value
                return result

            return run

        def micro_batches(*args: Any) -> Iterator[Any]:
            iterator = original(*args)
            while (micro := timed("data", lambda: next(iterator, None))()) is not None:
                yield micro

        step, original = self.step, self.step._on_device
        forward, update = step._forward, self.optimizer.step
        replaced = {"_on_device": micro_batches, "_forward": timed("forward", forward)}
        for name, function in replaced.items():
            setattr(step, name, function)
        self.optimizer.step = timed("optimizer", update)  # type: ignore[method-assign]
        try:
            whole = self.run(0)
        finally:
            for name in replaced:
                delattr(step, name)
            del self.optimizer.step
        found["forward"] -= found["data"]  # a micro-batch is copied at the start of its forward pass
        found["backward and reduction"] = whole - sum(found.values())
        return found


class _Seconds:
    """Wall seconds of a block, the device's work included."""

    value = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> _Seconds:
        self._wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.value = time.perf_counter() - self.start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _step_row(variant: _Variant, times: Sequence[float], base: Sequence[float], name: str) -> dict[str, Any]:
    from pretrain.hardware import peak_flops
    from pretrain.memory_plan import memory_per_gpu
    from pretrain.plan import stage_flops_per_token

    seconds = statistics.median(times)
    peak = peak_flops(variant.device, variant.recipe.precision)
    flops = stage_flops_per_token(variant.recipe.model, variant.stage) * variant.tokens
    return {
        "name": name,
        "seconds": seconds,
        "all_seconds": list(times),
        "tokens_per_second": variant.tokens / seconds,
        "mfu": flops / seconds / (peak * mesh.world_size()) if peak else None,
        "time_ratio": statistics.median(a / b for a, b in zip(times, base, strict=True)),
        "split_seconds": variant.split(),
        "peak_bytes": variant.peak or None,
        "planned_bytes": sum(memory_per_gpu(variant.recipe, variant.stage, mesh.world_size()).values()),
    }


def _step_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        mfu = f"  MFU {row['mfu']:.1%}" if row["mfu"] else ""
        memory = f"  peak {row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else ""
        split = "  ".join(f"{part} {seconds:.3f}" for part, seconds in row["split_seconds"].items())
        lines.append(
            f"{row['name']:40s} {row['seconds']:8.3f} s  x{row['time_ratio']:.2f}  "
            f"{row['tokens_per_second']:10.0f} tokens/s{mfu}{memory}  planned {row['planned_bytes'] / 2**30:.2f} GiB"
        )
        lines.append(f"{'':40s} {split} (s, waiting after each)")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint


def checkpoint(args: argparse.Namespace) -> int:
    """Run `hsa bench checkpoint`."""
    from parallel.checkpoint import load_checkpoint, save_checkpoint, verify
    from pretrain.assembly import assemble

    recipe = load_recipe(args.recipe, args.overrides).recipe
    if args.dir is not None and not args.dir.is_dir():
        raise RecipeError(f"--dir {args.dir}: there is no such directory")
    check_machine(recipe)
    check_stage(recipe, recipe.stages[0], mesh.launched_world_size())
    device = mesh.initialize(recipe.parallel, recipe.device, seed=recipe.seed)
    try:
        _, chunks, optimizer = assemble(recipe, device, deterministic=False)
        optimizer.init_state()
        made = tempfile.mkdtemp(prefix="hsa-bench-checkpoint-", dir=args.dir) if mesh.is_writer() else ""
        folder = Path(mesh.broadcast_object(made))
        times: dict[str, list[float]] = {"save": [], "load": [], "verify": []}
        size = 0
        try:
            for number in range(1, args.repeats + 1):
                with _Seconds(device) as seconds:
                    path = save_checkpoint(folder, number, chunks, optimizer, extra={}, keep_last=1)
                times["save"].append(seconds.value)
                size = sum(file.stat().st_size for file in path.iterdir())
                with _Seconds(device) as seconds:
                    load_checkpoint(path, chunks, optimizer)
                times["load"].append(seconds.value)
                with _Seconds(device) as seconds:
                    verify(path)
                times["verify"].append(seconds.value)
        finally:
            mesh.barrier()
            if mesh.is_writer():
                _remove(folder)
        rows = [
            {
                "name": name,
                "seconds": statistics.median(values),
                "all_seconds": values,
                "gigabytes_per_second": size / statistics.median(values) / 1e9,
            }
            for name, values in times.items()
        ]
        lines = [f"{row['name']:8s} {row['seconds']:8.3f} s  {row['gigabytes_per_second']:6.3f} GB/s" for row in rows]
        lines.insert(0, f"checkpoint of {size / 1e9:.3f} GB, model and optimizer; training waits for a save")
        _report(args, device, {"recipe": args.recipe, "bytes": size, "rows": rows}, lines)
    finally:
        mesh.shutdown()
    return 0


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _report(args: argparse.Namespace, device: torch.device, figures: dict[str, Any], lines: Sequence[str]) -> None:
    """Lines to stdout and figures with the machine to --json, on the writer."""
    if not mesh.is_writer():
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine: dict[str, Any] = {"device": name, "ranks": mesh.world_size(), "torch": torch.__version__}
    print(f"{args.recipe} on {machine['ranks']} rank(s), {name}")
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_text(json.dumps({**figures, "overrides": args.overrides, "machine": machine}, indent=1))
