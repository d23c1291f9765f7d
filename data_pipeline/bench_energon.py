"""The comparison of `hsa bench data` with megatron-energon (the optional baseline), in a process of its own.

    PYTHON -m data_pipeline.bench_energon SHARDS WORK DOCUMENTS

SHARDS are this package's shards, which energon reads as a plain WebDataset; WORK becomes its data set (hard links and
its index). It reads DOCUMENTS documents in this process (no workers), its best case: no shuffle buffer, no batches, no
collecting of garbage. Only NumPy and megatron-energon are imported, so PYTHON can be that of another environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(python: str, shards: Path, work: Path, documents: int) -> dict[str, Any] | str:
    """Start it with the interpreter ``python``; its figures, or a sentence saying why there are none."""
    probe = [python, "-c", "import megatron.energon"]
    paths = os.pathsep.join(os.path.abspath(p) for p in sys.path) if python == sys.executable else ""
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        if subprocess.run(probe, env=environment, capture_output=True).returncode:
            return f"{python} has no megatron-energon; pip install megatron-energon==7.4.1, or name another --energon"
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), paths])
        command = [python, "-m", "data_pipeline.bench_energon", str(shards), str(work), str(documents)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        return f"cannot run {python} ({error.strerror}); name a Python with megatron-energon with --energon"
    if done.returncode:
        return f"megatron-energon failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prepare the data set, read it, print one line of JSON."""
    import numpy as np
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    shards, work, documents = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    work.mkdir()
    for file in shards.glob("*.tar"):
        (work / file.name).hardlink_to(file)
    prepare = "from megatron.energon.cli.main import main; main()"
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--no-progress"]
    command = [sys.executable, "-c", prepare, "prepare", str(work), "--num-workers", "1", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    @edataclass
    class Document(Sample):
        tokens: np.ndarray

    @stateless
    def cook(sample: dict) -> Document:
        return Document(**basic_sample_keys(sample), tokens=np.frombuffer(sample["tokens.u16"], "<u2"))

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

    dataset = get_train_dataset(
        work,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    samples = iter(get_savable_loader(dataset, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None))
    for _ in range(documents // 10):
        next(samples)
    rates = []
    for _ in range(3):
        tokens, started = 0, time.process_time()
        for _ in range(documents):
            tokens += len(next(samples).tokens)
        rates.append(tokens / (time.process_time() - started))
    print(json.dumps({"tokens_per_second": max(rates)}))


if __name__ == "__main__":
    main()
