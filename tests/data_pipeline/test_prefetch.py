"""The reader process: same batches, survives SIGKILL, leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.batch import PackedBatch
from data_pipeline.config import DataConfig, MixEntry
from data_pipeline.errors import DataError
from data_pipeline.lanes import BatchStream, open_stream
from data_pipeline.prefetch import PrefetchingStream
from data_pipeline.readers import SharedReaders


def open_(data: DataConfig) -> BatchStream:
    return open_stream(
        data, lanes=4, lane_ids=[0, 2], batch=8, context=256, chunk_size=16, seed=5, synthetic={"rate": 0.4}
    )


def equal(a: PackedBatch, b: PackedBatch) -> bool:
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in vars(a)
    )


def kill_reader(stream: PrefetchingStream) -> None:
    """SIGKILL the reader; when it is dead already (and batches from before are waiting) there is nothing to kill."""
    pid = stream.reader_pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def gone(pid: int) -> bool:
    """The process ends within 20 seconds (a zombie that nobody collects has ended)."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_same_batches_through_kills_and_the_state_is_never_ahead(data: DataConfig) -> None:
    plain = open_(data)
    with PrefetchingStream(open_(data), depth=2) as ahead:
        assert ahead.state_dict() == plain.state_dict() and ahead.domain_names == plain.domain_names
        for step in range(25):
            assert equal(ahead.next_batch(), plain.next_batch())
            assert ahead.state_dict() == plain.state_dict()
            if step in (3, 4, 8, 11, 16):
                kill_reader(ahead)
            if step == 7:
                middle = ahead.state_dict()
        assert ahead.epochs() == plain.epochs()
        ahead.load_state_dict(middle)
        plain.load_state_dict(middle)
        assert equal(ahead.next_batch(), plain.next_batch())
        pid = ahead.reader_pid
    assert gone(pid)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["reader", "trainer"])), min_size=1, max_size=4))
def test_any_kills_of_reader_and_trainer(data: DataConfig, schedule) -> None:
    """A killed reader is replaced, a killed trainer starts again from what it saved, with its own read-ahead."""
    plain = open_(data)
    ahead = PrefetchingStream(open_(data), depth=2)
    try:
        for batches, victim in [*schedule, (2, "reader")]:
            for _ in range(batches):
                assert equal(ahead.next_batch(), plain.next_batch())
            kill_reader(ahead)
            if victim == "trainer":
                state = ahead.state_dict()
                ahead.close()
                ahead = PrefetchingStream(open_(data), depth=3)
                ahead.load_state_dict(state)
        assert equal(ahead.next_batch(), plain.next_batch())
        assert ahead.skipped() == {}
    finally:
        ahead.close()


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    jobs=st.lists(
        st.tuples(st.sampled_from([(1, 3), (2, 2), (4, 1), (3, 1)]), st.integers(1, 3), st.booleans()),
        min_size=2,
        max_size=3,
    )
)
def test_any_number_of_ranks_and_readers_gives_the_same_batches(data: DataConfig, jobs) -> None:
    """Jobs of R ranks with some reader processes each, over 12 lanes: the global batches of a single reader, though a
    reader of every job is killed on the way or the job is killed after its checkpoint."""
    options = {"lanes": 12, "batch": 24, "context": 256, "chunk_size": 16, "seed": 5, "synthetic": {"rate": 0.4}}
    plain = open_stream(data, lane_ids=range(12), **options)
    state: dict | None = None
    for (ranks, readers), batches, killed in jobs:
        streams = [
            SharedReaders(lambda ids: open_stream(data, lane_ids=ids, **options), range(r, 12, ranks), readers, 2)
            for r in range(ranks)
        ]
        try:
            for stream in streams:
                stream.start(state)
            for step in range(batches + killed):
                if step == batches:  # trained after the checkpoint, and lost
                    [stream.next_batch() for stream in streams]
                    break
                if step == 1:
                    kill_reader(streams[0]._streams[-1])
                expected, parts = plain.next_batch(), [stream.next_batch() for stream in streams]
                for name in vars(expected):
                    whole = torch.empty_like(getattr(expected, name)).view(12, 2, -1)
                    for rank, part in enumerate(parts):
                        whole[rank::ranks] = getattr(part, name).view(12 // ranks, 2, -1)
                    assert torch.equal(whole.view_as(getattr(expected, name)), getattr(expected, name))
                state = {lane: position for stream in streams for lane, position in stream.state_dict().items()}
            assert state == plain.state_dict()
        finally:
            for stream in streams:
                stream.close()


def test_reader_errors_arrive_as_they_are(data: DataConfig, shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    config = DataConfig(tokenizer=str(folder), mix=[MixEntry("notes", str(folder), 1.0)])
    stream = open_(config)
    for file in folder.glob("notes*.tar"):
        flip(file, 515)
    with PrefetchingStream(stream, depth=1) as ahead:
        for _ in range(2):
            with pytest.raises(DataError, match="notes-0.*damaged"):
                for _ in range(50):
                    ahead.next_batch()
    with pytest.raises(DataError, match="data.prefetch must be at least 1"):
        PrefetchingStream(open_(data), depth=0)


def test_a_reader_that_never_starts_is_reported(data: DataConfig, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with PrefetchingStream(open_(data)) as ahead, pytest.raises(RuntimeError, match="died 4 times in a row"):
        ahead.next_batch()


def test_reader_leaves_when_the_trainer_is_killed(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "stream.pickle").write_bytes(pickle.dumps(open_(data)))
    script = (
        "import pickle, sys, time; from data_pipeline.prefetch import PrefetchingStream\n"
        f"s = PrefetchingStream(pickle.load(open({str(tmp_path / 'stream.pickle')!r}, 'rb')))\n"
        "s.next_batch(); print(s.reader_pid, flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert gone(pid)


def test_the_reader_does_not_import_torch(data: DataConfig) -> None:
    script = (
        "import pickle, sys; import data_pipeline.reader\n"
        "stream = pickle.load(sys.stdin.buffer); stream.next_arrays(); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], input=pickle.dumps(open_(data)), env=environment, check=True)


def test_arrays_become_the_documented_tensors(data: DataConfig) -> None:
    batch = open_(data).next_batch()
    kinds = {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_weights": torch.float32,
        "documents": torch.int32,
        "domains": torch.int16,
    }
    assert {name: getattr(batch, name).dtype for name in kinds} == kinds
    assert batch.tokens.shape == (4, 256) and batch.num_tokens == 1024
    assert batch.select(slice(1, 3)).tokens.data_ptr() == batch.tokens[1:3].data_ptr()
    assert np.shares_memory(batch.tokens.numpy(), batch.to("cpu").tokens.numpy())
