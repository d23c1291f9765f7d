"""`hsa train`: start a run, or go on with it. The loop reads top to bottom like the training it is.

One rank, torchrun or srun. Everything that can be wrong with the user's input is looked at before the model is built.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.mesh import launched_rank, launched_world_size
from parallel.optional import describe, describe_use
from pretrain.errors import RecipeError
from pretrain.recipe import LoadedRecipe, Recipe, StageConfig, effective_micro_batch, load_recipe
from pretrain.run_dir import RunDir, add_allow_change, check_resume
from pretrain.signals import STOPPED, StopRequest
from pretrain.stages import Position, StageController
from pretrain.topology import check_machine, check_stage

if TYPE_CHECKING:
    from data_pipeline.config import SyntheticConfig

MAX_SKIPPED_UPDATES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hsa train`."""
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, e.g. optimizer.lr=0.01")
    parser.add_argument("--run-dir", type=Path, default=None, help="run directory (default: runs/NAME)")
    parser.add_argument(
        "--until-stage", default=None, metavar="NAME", help="stop with status 0 once this stage is done"
    )
    add_allow_change(parser)


def main(args: argparse.Namespace) -> int:
    """Run `hsa train`; returns the exit status."""
    loaded = load_recipe(args.recipe, args.overrides)
    recipe = loaded.recipe
    if launched_rank() == 0:
        for warning in loaded.warnings:
            print(f"hsa: warning: {warning}", file=sys.stderr)
    names = [stage.name for stage in recipe.stages]
    if args.until_stage is not None and args.until_stage not in names:
        raise RecipeError(f"--until-stage {args.until_stage}: the recipe's stages are {', '.join(names)}")
    run_dir = RunDir(args.run_dir or Path("runs") / recipe.name)
    check_input(recipe, launched_world_size())
    if run_dir.exists() and nothing_to_do(run_dir, recipe, args.until_stage):
        if launched_rank() == 0:
            print(f"{run_dir.path}: nothing left to train")
        return 0
    stop = StopRequest()
    try:
        with Training(loaded, run_dir, allow=args.allow_change, until_stage=args.until_stage, stop=stop) as training:
            return training.run()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"hsa: {run_dir.path}: the disk is full: {error}. Free some space and run the same command again.",
            flush=True,
        )
        return 1
    finally:
        stop.close()


def check_input(recipe: Recipe, world_size: int) -> None:
    """Everything that can be wrong with topology, device and data, before a process group, a GPU or the run directory
    is used.
    """
    from data_pipeline.lanes import open_stream
    from data_pipeline.tokenizer import load_tokenizer

    check_machine(recipe)
    for stage in recipe.stages:
        check_stage(recipe, stage, world_size)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"data.tokenizer: {recipe.data.tokenizer} has {tokenizer.vocab_size} tokens, model.vocab_size is "
            f"{recipe.model.vocab_size}: use the preset's own tokenizer, or set model.vocab_size"
        )
    for stage in recipe.stages:
        open_stream(recipe.data, **stream_arguments(recipe, stage, lane_ids=range(recipe.data.lanes))).close()


def stream_arguments(recipe: Recipe, stage: StageConfig, *, lane_ids: Any) -> dict[str, Any]:
    """Arguments of `open_stream` for one stage."""
    return {
        "lanes": recipe.data.lanes,
        "lane_ids": list(lane_ids),
        "batch": recipe.stage_batch(stage),
        "context": stage.context,
        "chunk_size": recipe.model.chunk_size,
        "seed": recipe.seed,
        "mix": stage.data.mix,
        "synthetic": stage_synthetic(recipe, stage),
    }


def stage_synthetic(recipe: Recipe, stage: StageConfig) -> SyntheticConfig:
    """The recipe's synthetic samples with what the stage changes about them."""
    from data_pipeline.mix import merge_synthetic

    return merge_synthetic(recipe.data.synthetic, stage.data.synthetic)


def nothing_to_do(run_dir: RunDir, recipe: Recipe, until_stage: str | None) -> bool:
    """True when the run is finished, has done `max_steps`, or has left the stage asked for. Reads only."""
    run = run_dir.read_run()
    if run.get("finished"):
        return True
    position = run.get("position") or {}
    if recipe.max_steps is not None and position.get("step", 0) >= recipe.max_steps:
        return True
    return until_stage is not None and any(entry["stage"] == until_stage for entry in position.get("exits", []))


@dataclass
class StopReason:
    """Why the loop ended: `status` is the process's exit status, `requeue` asks Slurm for another start."""

    text: str
    status: int
    requeue: bool = False


class Training:
    """One start of one run: everything between the checks and the exit status. Leaving the context cleans up."""

    def __init__(
        self, loaded: LoadedRecipe, run_dir: RunDir, *, allow: list[str], until_stage: str | None, stop: StopRequest
    ) -> None:
        self.loaded = loaded
        self.recipe = loaded.recipe
        self.run_dir = run_dir
        self.allow = allow
        self.until_stage = until_stage
        self.stop = stop
        self._cleanup = contextlib.ExitStack()
        self._prober: Any = None
        self._skipped = 0  # updates in a row
        self._saving: tuple[Any, dict[str, Any]] | None = None  # a save under way, and the position it is of
        self._unreadable: dict[str, int] = {}  # documents that no rank could read, by shard

    def __enter__(self) -> Training:
        try:
            self._set_up()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and hasattr(self, "tracker"):
            self.tracker.close("FAILED")
        self._cleanup.close()

    # ------------------------------------------------------------------------------------------------------------
    # set-up

    def _set_up(self) -> None:
        import torch

        from parallel import mesh
        from parallel.checkpoint import clean_temporary, find_latest
        from parallel.experts import describe_experts
        from pretrain.console import Console
        from pretrain.hardware import peak_flops
        from pretrain.metrics_log import MetricsLog
        from pretrain.tracking import Tracker

        recipe = self.recipe
        # The writer claims the directory first: a second `hsa train` on it must stop before it starts a process group.
        if launched_rank() == 0:
            self.run_dir.create()
            self.run_dir.acquire()
            self._cleanup.callback(self.run_dir.release)
            if self.run_dir.exists():
                check_resume(self.run_dir.read_recipe(), self.loaded.frozen, self.allow)
            clean_temporary(self.run_dir.checkpoints)
        self.device = mesh.initialize(recipe.parallel, recipe.device, seed=recipe.seed)
        self._cleanup.callback(mesh.shutdown)
        self.is_writer = mesh.is_writer()
        deterministic = recipe.deterministic if recipe.deterministic is not None else self.device.type == "cpu"
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=self.device.type == "cuda")
        self._build(deterministic)

        checkpoint = mesh.broadcast_object(find_latest(self.run_dir.checkpoints) if self.is_writer else None)
        self.controller = StageController(recipe)
        self.lanes: dict[Any, Any] | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        position = self.controller.position
        if self.is_writer and self.run_dir.exists():
            # Recorded only now: a checkpoint that does not fit the changed recipe leaves everything as it was.
            self.run_dir.resume(self.loaded.frozen, allow=self.allow, step=position.step)
        elif self.is_writer:
            self.run_dir.begin(self.loaded.frozen, name=recipe.name, plan=self.controller.plan())
        self.run_id = mesh.broadcast_object(self.run_dir.read_run()["run_id"] if self.is_writer else "")
        restarts = 0
        if self.is_writer:
            restarts = self.run_dir.record_start(step=position.step, ranks=mesh.world_size())
            self.metrics = MetricsLog(self.run_dir.metrics_path, resume_step=position.step)
            self._cleanup.callback(self.metrics.close)
        plan = self.controller.plan()
        peak = peak_flops(self.device, recipe.precision)
        self.console = Console(
            plan["total_steps"],
            is_writer=self.is_writer,
            step=position.step,
            tokens=position.tokens,
            peak_flops=peak * mesh.world_size() if peak else None,
        )
        self._cleanup.callback(self.console.close)
        held = sum(p.numel() for model in self.models for p in model.parameters())
        self.console.say(
            f"{recipe.name}: {held / 1e6:.2f}M parameters on this rank, "
            f"{mesh.world_size()} rank(s), {self.device}, {recipe.precision}; run directory {self.run_dir.path}"
        )
        for line in describe():
            self.console.say(line)
        on_gpu, experts = self.device.type == "cuda", describe_experts(self.models)
        self.console.say(describe_use(recipe.compute, on_gpu=on_gpu, experts=experts))
        if restarts:
            self.console.say(
                f"resumed at step {position.step} ({position.tokens:,} tokens), start number {restarts + 1}"
            )
        self.tracker = Tracker(
            self.run_dir,
            recipe.tracking.mlflow,
            is_writer=self.is_writer,
            params=self.loaded.frozen,
            resume_step=position.step,
            say=self.console.say,
        )
        self.saved_at = time.monotonic()
        self.saved_step = position.step if checkpoint is not None else -1

    def _build(self, deterministic: bool) -> None:
        """Model, Megatron's gradient reduction, optimizer."""
        from pretrain.assembly import assemble
        from pretrain.graphed import uses_graph

        self.cuda_graph = uses_graph(self.recipe, self.device)
        self.models, self.chunks, self.optimizer = assemble(self.recipe, self.device, deterministic=deterministic)

    def _restore(self, checkpoint: Path) -> None:
        from parallel.checkpoint import load_checkpoint

        extra = load_checkpoint(checkpoint, self.chunks, self.optimizer)
        self.controller.position = Position(**extra["position"])
        self.lanes = extra["lanes"]

    # --------------------------------------------------------------------------------------------------------------
    # loop

    def run(self) -> int:
        """Train until something says stop; returns the exit status."""
        from parallel import mesh

        reason = StopReason("the recipe is done", 0)
        while not self.controller.position.finished:
            stopped = self._run_stage()
            if stopped is not None:
                reason = stopped
                break
        position = self.controller.position
        if self.saved_step != position.step or position.finished:
            self._save()
        self._finish_save()
        if self.is_writer:
            self.run_dir.update_run(finished=position.finished, plan=self.controller.plan())
            if reason.requeue:
                self.run_dir.request_requeue()
            if position.finished:
                self._draw_curve()
        self.console.say(f"stopped at step {position.step}: {reason.text}")
        self.tracker.close("FINISHED" if position.finished else "KILLED")
        mesh.barrier()
        return reason.status

    def _run_stage(self) -> StopReason | None:
        """Train in the stage going on. None when the stage has ended, else why the run stops here."""
        from parallel.evidence import EvidenceLoss

        controller = self.controller
        stage, position = controller.stage, controller.position
        synthetic = stage_synthetic(self.recipe, stage)
        evidence_chunks = (synthetic.evidence_context or 0) // self.recipe.model.chunk_size
        for model in self.models:
            model.set_schedule(window=stage.window, hsa_window=stage.hsa_window, top_k=stage.top_k)
            model.schedule.evidence = EvidenceLoss(synthetic.evidence_weight, evidence_chunks)
        self._banner(stage)
        self.tracker.stage_started(stage.name, position.stage)
        with self._stream(stage) as stream:
            step = self._make_step(stream.domain_names)
            while True:
                early = self._stop_before_step()
                if early is not None:
                    return early
                started = time.perf_counter()
                batch = stream.next_batch()
                waited = time.perf_counter() - started
                rate = self._set_learning_rate()
                unreadable = stream.skipped()
                result = step(
                    batch,
                    self.micro_batch,
                    wants_stop=self.stop.received is not None,
                    skipped=sum(unreadable.values()),
                )
                controller.advance()
                self.lanes = stream.state_dict()
                grown = self._name_unreadable(result.skipped, unreadable)
                self._log(stage, result, rate, time.perf_counter() - started, waited, grown)
                self._count_skipped(result.updated)
                metric = self._probe(stage) if controller.probe_due() else None
                leaving = controller.exit_reason(metric)
                if leaving is not None:
                    self._leave(stage, leaving, metric)
                    return self._stop_after_stage(stage, result.stop)
                if result.stop:
                    return StopReason(f"asked to stop ({self.stop.received or 'by another rank'})", STOPPED, True)
                if self._saving is not None and self._saving[0].written():
                    self._finish_save()
                if self._checkpoint_due():
                    self._save()

    def _stop_before_step(self) -> StopReason | None:
        limit = self.recipe.max_steps
        if limit is not None and self.controller.position.step >= limit:
            return StopReason(f"max_steps {limit} reached", 0)
        return None

    def _stop_after_stage(self, stage: StageConfig, asked: int) -> StopReason | None:
        if self.controller.position.finished:
            return None
        if asked:
            return StopReason(f"asked to stop ({self.stop.received or 'by another rank'})", STOPPED, True)
        if stage.name == self.until_stage:
            return StopReason(f"stage {stage.name} is done", 0)
        self._save()
        return None

    def _leave(self, stage: StageConfig, reason: str, metric: float | None) -> None:
        self.console.say(f"stage {stage.name} ends at step {self.controller.position.step}: {reason}")
        self.controller.leave_stage(reason, metric)
        self.tracker.stage_finished(stage.name)
        if self.is_writer:
            self.run_dir.update_run(plan=self.controller.plan())

    # -------------------------------------------------------------------------------------------------------------
    # pieces

    def _banner(self, stage: StageConfig) -> None:
        from pretrain.plan import stage_flops_per_token

        batch = self.recipe.stage_batch(stage)
        details = {
            "context": stage.context,
            "window": stage.window,
            "top-k": stage.top_k or "full",
            "batch": f"{batch} x {stage.context} tokens",
            "mix": stage.data.mix or "default",
            "synthetic": stage_synthetic(self.recipe, stage).rate,
            "until": stage.until.metric or f"{stage.until.tokens:,} tokens",
        }
        self.console.stage(
            stage.name,
            self.controller.position.stage,
            len(self.recipe.stages),
            details,
            flops_per_token=stage_flops_per_token(self.recipe.model, stage),
        )

    @contextlib.contextmanager
    def _stream(self, stage: StageConfig) -> Iterator[Any]:
        """This rank's lanes of the stage's batches, at the position where training stands."""
        from data_pipeline.lanes import open_stream
        from data_pipeline.readers import SharedReaders
        from parallel import mesh

        data, ranks, rank = self.recipe.data, mesh.data_size(), mesh.data_rank()
        lane_ids = range(rank, data.lanes, ranks)

        def open_lanes(ids: Any) -> Any:
            return open_stream(data, **stream_arguments(self.recipe, stage, lane_ids=ids))

        stream: Any
        if data.prefetch:
            stream = SharedReaders(open_lanes, lane_ids, data.readers, data.prefetch).start(self.lanes)
        else:
            stream = open_lanes(lane_ids)
            if self.lanes is not None:
                stream.load_state_dict(self.lanes)
        self.micro_batch = effective_micro_batch(self.recipe, stage, ranks)
        try:
            yield stream
        finally:
            stream.close()

    def _make_step(self, domains: list[str]) -> Any:
        import torch

        from pretrain.train_step import TrainStep

        step = TrainStep(self.chunks, self.optimizer, domains, self.device, cuda_graph=self.cuda_graph)
        if self.device.type == "cuda":  # this step took the place of the last stage's, whose memory is free by now
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return step

    def _set_learning_rate(self) -> float:
        """Set every parameter group's rate for the step to come; returns the recipe's `lr` at this step."""
        factor = self.controller.learning_rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["max_lr"] * factor
            group["weight_decay"] = group["wd_mult"] * self.recipe.optimizer.weight_decay
        return self.recipe.optimizer.lr * factor

    def _log(self, stage: StageConfig, result: Any, rate: float, seconds: float, waited: float, grown: bool) -> None:
        if not self.is_writer:
            return
        position = self.controller.position
        record = {
            "step": position.step,
            "stage": stage.name,
            "tokens": position.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            **{f"loss/{name}": loss for name, loss in result.domain_losses.items()},
            **result.experts,
            **({} if result.evidence is None else {"evidence_loss": result.evidence}),
            **{f"loss_from/{position}": loss for position, loss in result.position_losses.items()},
        }
        if self.device.type == "cuda":
            import torch

            record["gpu_memory_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        if result.skipped:
            record["skipped_documents"] = result.skipped
        if grown:
            record["skipped"] = sorted(self._unreadable.items())
        if not result.updated:
            self.console.say(f"step {position.step}: gradient norm {result.grad_norm}, the update was skipped")
        self.metrics.append(record)
        self.console.step(record)
        self.tracker.step_logged()

    def _name_unreadable(self, documents: int, own: dict[str, int]) -> bool:
        """Say which shards' documents were left out if there are more than before; all ranks know whether there are."""
        from parallel import mesh

        if documents == sum(self._unreadable.values()):
            return False
        by_rank = dict(mesh.gather_objects((mesh.data_rank(), own)))
        found: dict[str, int] = {}
        for shards in by_rank.values():
            for file, count in shards.items():
                found[file] = found.get(file, 0) + count
        for file, count in found.items():
            if more := count - self._unreadable.get(file, 0):
                self.console.say(f"skipped {more} documents of {file} that cannot be read, {count} in all")
        self._unreadable = found
        return True

    def _count_skipped(self, updated: bool) -> None:
        """A single bad batch is skipped; a run whose gradients stay broken must not burn its nodes."""
        self._skipped = 0 if updated else self._skipped + 1
        if self._skipped >= MAX_SKIPPED_UPDATES:
            raise FloatingPointError(
                f"gradients were not finite in {self._skipped} steps in a row, the last at step "
                f"{self.controller.position.step}: lower optimizer.lr, or go on from an earlier checkpoint "
                f"(remove the newest ones from {self.run_dir.checkpoints})"
            )

    def _probe(self, stage: StageConfig) -> float:
        """Measure the stage's exit metric; the writer's value counts on every rank."""
        from parallel import mesh
        from pretrain.probes import Probe

        until, position = stage.until, self.controller.position
        assert until.metric is not None
        if self._prober is None:
            self._prober = Probe(self.models, self.recipe)
        value, record = self._prober.measure(stage, until.metric, samples=until.samples)
        value = mesh.broadcast_object(value)
        self.console.say(f"probe at step {position.step}: {until.metric} = {value:.3f}")
        self.tracker.log_evaluation({"name": until.metric, "stage": stage.name, **record}, position.step)
        return value

    def _checkpoint_due(self) -> bool:
        """True when the recipe's interval has passed; the writer's clock counts on every rank."""
        from parallel import mesh

        config = self.recipe.checkpoint
        if config.every_steps and (self.controller.position.step - max(self.saved_step, 0)) >= config.every_steps:
            return True
        if config.every_minutes is None:
            return False
        return mesh.broadcast_object(time.monotonic() - self.saved_at >= 60 * config.every_minutes)

    def _save(self) -> None:
        """Save, in the background if the recipe says so; one save at a time."""
        from parallel.checkpoint import PendingSave

        self._finish_save()
        position = self.controller.position
        if self.is_writer:
            self.metrics.sync()
        background = self.recipe.checkpoint.async_save
        save = PendingSave(
            self.run_dir.checkpoints,
            position.step,
            self.chunks,
            self.optimizer,
            extra={"position": position.as_dict(), "lanes": self.lanes, "run_id": self.run_id},
            keep_last=self.recipe.checkpoint.keep_last,
            keep=self._keep_forever,
            background=background,
        )
        self._saving = save, position.as_dict()
        self.saved_at, self.saved_step = time.monotonic(), position.step
        if not background:
            self._finish_save()

    def _finish_save(self) -> None:
        """Wait for the save under way, if there is one; the run directory says then where it stands."""
        if self._saving is None:
            return
        (save, position), self._saving = self._saving, None
        save.finish()
        if self.is_writer:
            self.run_dir.update_run(position=position)

    def _draw_curve(self) -> None:
        from pretrain.evaluation.plots import training_curve_of_run

        self.tracker.log_picture(training_curve_of_run(self.run_dir.path, self.run_dir.eval / "training.png"))

    def _keep_forever(self, step: int) -> bool:
        """True for checkpoints that rotation must leave: about one per `keep_every_tokens`."""
        every = self.recipe.checkpoint.keep_every_tokens
        if not every:
            return False
        stage = self.controller.stage
        tokens_per_step = self.recipe.stage_batch(stage) * stage.context
        interval = max(1, round(every / tokens_per_step))
        return step % interval == 0
