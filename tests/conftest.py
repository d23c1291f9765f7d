"""A tiny corpus and a tiny recipe for every test that trains: real shards, a real tokenizer, seconds of work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

WORDS = (
    "the of and to a in that it was his he with for as had you not be her is but at on she my have him which "
    "by from all this they so were me one said what would there been will if no who out up when about more do "
    "like into them then some could our day time little must good well old know house before very without "
    "great man young see never every "
).split()


def sentences(seed: int, words: int) -> str:
    """Text of `words` common words in sentences, the same for the same seed."""
    rng = np.random.default_rng(seed)
    picked = [WORDS[i] for i in rng.zipf(1.3, words * 2) if i < len(WORDS)][:words]
    text, start = [], 0
    while start < len(picked):
        length = int(rng.integers(4, 14))
        text.append(" ".join(picked[start : start + length]).capitalize() + ".")
        start += length
    return " ".join(text)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with text/ (two domains and held_out.jsonl) and shards/."""
    from data_pipeline.tokenizing import tokenize

    folder = tmp_path_factory.mktemp("tiny-data")
    text = folder / "text"
    text.mkdir()
    for domain, seed in (("books", 1), ("essays", 2)):
        with (text / f"{domain}.jsonl").open("w") as file:
            for number in range(24):
                document = {"id": f"{domain}-{number}", "domain": domain, "source": "made for tests"}
                file.write(json.dumps({**document, "text": sentences(100 * seed + number, 300 + 40 * number)}) + "\n")
    held_out = {"id": "held", "domain": "books", "source": "made for tests", "text": sentences(9, 4000)}
    (text / "held_out.jsonl").write_text(json.dumps(held_out) + "\n")
    tokenize([text], folder / "shards", "bpe:320", workers=1, quiet=True)
    return folder


def tiny_container(data: Path) -> dict:
    """A recipe of two stages over `tiny_data`: 12 steps of a 40k-parameter model with every part of the large one."""
    return {
        "name": "tiny",
        "seed": 5,
        "precision": "fp32",
        "model": {
            "preset": "demo",
            "vocab_size": 320,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "head_dim": 8,
            "retrieval_dim": 16,
            "encoder_ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "shared_expert_ffn_hidden_size": 16,
        },
        "data": {
            "tokenizer": str(data / "shards" / "tokenizer.json"),
            "held_out": str(data / "text" / "held_out.jsonl"),
            "lanes": 4,
            "mix": [
                {"name": "books", "path": str(data / "shards"), "weight": 2},
                {"name": "essays", "path": str(data / "shards"), "weight": 1},
            ],
            "synthetic": {"rate": 0.5, "tasks": {"copy": 1.0}, "answer_weight": 4.0},
        },
        "optimizer": {"name": "adamw", "lr": 3e-3, "warmup_steps": 3},
        "stages": [
            {"name": "first", "context": 64, "window": 16, "batch": 4, "until": {"tokens": 7 * 4 * 64}},
            {
                "name": "second",
                "context": 128,
                "window": 16,
                "top_k": 4,
                "batch": 4,
                "learning_rate": {"schedule": "cosine", "end": 0.1},
                "until": {"tokens": 5 * 4 * 128},
            },
        ],
        "checkpoint": {"every_steps": 2, "every_minutes": None, "keep_last": 3},
        "tracking": {"mlflow": {"uri": "none"}},
    }


@pytest.fixture
def tiny_recipe(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_container(tiny_data)))
    return path


@pytest.fixture
def hsa() -> Callable[..., subprocess.CompletedProcess]:
    """Run the command line in a process of its own: `hsa("train", recipe, ranks=2)`."""

    def run(*words: object, ranks: int = 1, timeout: float = 240, **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(
            hsa_command(*words, ranks=ranks),
            env=hsa_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            **kwargs,
        )

    return run


def hsa_command(*words: object, ranks: int = 1) -> list[str]:
    """Argument list that runs `hsa` with this interpreter, under torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "pretrain", *map(str, words)]


def hsa_environment() -> dict[str, str]:
    """This environment without a launcher's variables and without a GPU, which has tests of its own.

    One thread per rank, so that sums have one order.
    """
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(run_dir: Path) -> list[tuple[int, str, float, float]]:
    """(step, stage, loss, grad norm) of every line of metrics.jsonl, floats with all their digits."""
    return [(r["step"], r["stage"], r["loss"], r["grad_norm"]) for r in records(run_dir)]


def records(run_dir: Path) -> list[dict]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    """A port below the ephemeral range: rank 0 listens seconds later, and until then no connection may be given it."""
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def lone_process(monkeypatch: pytest.MonkeyPatch, **place: object) -> Iterator[object]:
    """Process groups and seeds of a lone process, whatever launcher pytest itself runs under."""
    from parallel import mesh

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield mesh.initialize(**place)
    mesh.shutdown()


@pytest.fixture
def world_of_one(monkeypatch):
    """A lone process on the GPU where there is one; its device."""
    with lone_process(monkeypatch, seed=1234) as device:
        yield device


@pytest.fixture
def world_on_cpu(monkeypatch):
    """A lone process on the CPU, whatever the machine has."""
    with lone_process(monkeypatch, device="cpu", seed=1):
        yield
