"""One rank of the checkpoint tests: runs the jobs of its JSON argument and prints the results as JSON on rank 0.

A second argument gives parallel sizes as JSON. A job is {"kind": what to train, "to": last step, "load": directory or
null, "save": directory, "save_at": steps, "background": true to train while saving, "full": true for a disk that is
full on the last rank}.
"""

import importlib.util
import json
import sys
from pathlib import Path

from parallel import checkpoint, mesh

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).parents[1] / "parallel" / "toy.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def build(kind):
    """The toy of one kind; without dropout, whose random numbers differ between layouts."""
    kind = dict(kind)
    settings = toy.settings(kind.pop("name"), **kind.pop("settings", {}))
    return toy.Toy(settings, dropout=0.0, **kind)


def run(job):
    """Losses of the steps trained, and the lanes found in the checkpoint that was loaded."""
    mesh.seed_everything(11)
    trained, lanes = build(job["kind"]), None
    if job.get("load"):
        path = checkpoint.find_latest(Path(job["load"]))
        extra = checkpoint.load_checkpoint(path, trained.chunks, trained.optimizer)
        trained.steps, lanes = extra["steps"], extra["lanes"]
    losses, pending = [], None
    while trained.steps < job["to"]:
        losses.append(trained.step())
        if job.get("save") and trained.steps in job["save_at"]:
            extra = {
                "steps": trained.steps,
                "lanes": {lane: {"position": 100 * lane} for lane in range(mesh.rank(), 4, mesh.world_size())},
            }
            if pending is not None:
                pending.finish()
            pending = checkpoint.PendingSave(
                Path(job["save"]),
                trained.steps,
                trained.chunks,
                trained.optimizer,
                extra=extra,
                keep_last=2,
                background=job.get("background", False),
            )
            if not job.get("background"):
                pending.finish()
                pending = None
    if pending is not None:
        pending.finish()
    return {
        "losses": losses,
        "lanes": lanes,
        "weights": {k: v.double().sum().item() for k, v in trained.weights().items()},
    }


def fail_on_the_last_rank(job):
    """A disk that fills up on one rank only: every rank must say so."""
    from parallel import compat

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if mesh.rank() == mesh.world_size() - 1:
        checkpoint.sha256 = full
        compat.write_bucket = full
    try:
        run(job)
    except OSError as error:
        return mesh.gather_objects(error.strerror)
    return mesh.gather_objects("")


def main():
    mesh.initialize(mesh.ParallelConfig(**json.loads(sys.argv[2])) if len(sys.argv) > 2 else None, seed=11)
    jobs = json.loads(sys.argv[1])
    results = [(fail_on_the_last_rank if job.get("full") else run)(job) for job in jobs]
    if mesh.is_writer():
        print(json.dumps(results))
    mesh.shutdown()


if __name__ == "__main__":
    main()
