"""Whatever is killed and resized, whatever the mix and the packing: the batches of the unbroken run, no token twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, MixEntry
from data_pipeline.errors import DataError
from data_pipeline.lanes import BatchStream, open_stream
from data_pipeline.permutation import permute, seed_key
from data_pipeline.shards import ShardSet
from tests.data_pipeline.test_lanes import gather

LANES, SEED, UNIQUE = 12, 5, 5000
STAGES = [(256, None, 0.3), (96, "long", 0.0), (512, None, 1.0), (256, None, 0.1)]  # context, mix, synthetic rate
STEPS = 3  # of every stage
Batch = dict[str, np.ndarray]


def variant(data: DataConfig, name: str) -> DataConfig:
    """The small corpus mixed in ways that change what a lane must remember."""
    path = data.tokenizer
    long = MixEntry("long tales", path, 2.0, domain="tales", min_length=300)
    mixes = {"long": [long, MixEntry("text", path, 1.0)]}
    if name == "capped":
        mix = [
            dataclasses.replace(entry, max_epochs=epochs)
            for entry, epochs in zip(data.mix, (0.3, 1, None), strict=True)
        ]
        return dataclasses.replace(data, mix=mix, mixes=mixes)
    packing = {"best_fit": "best_fit", "split": "split"}[name]
    return dataclasses.replace(data, mixes=mixes, packing=packing, packing_buffer=5)


def open_stage(data: DataConfig, stage: int, ranks: int = 1, rank: int = 0) -> BatchStream:
    context, mix, rate = STAGES[stage]
    return open_stream(
        data,
        lanes=LANES,
        lane_ids=list(range(rank, LANES, ranks)),
        batch=24,
        context=context,
        chunk_size=16,
        seed=SEED,
        mix=mix,
        synthetic={"rate": rate, "min_length": 96, "hops": 2},
    )


def run(data: DataConfig, state: dict | None, step: int, steps: int, ranks: int, visit: Any) -> tuple[dict | None, int]:
    """Train ``steps`` steps from a checkpoint over the stages; returns the next checkpoint."""
    end = min(step + steps, STEPS * len(STAGES))
    while step < end:
        stage = step // STEPS
        streams = [open_stage(data, stage, ranks, rank) for rank in range(ranks)]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        while step < min(end, (stage + 1) * STEPS):
            visit(step, gather([s.next_arrays() for s in streams]))
            step += 1
        state = json.loads(json.dumps({k: v for s in streams for k, v in s.state_dict().items()}))
    return state, step


@pytest.fixture(scope="module")
def unbroken(data: DataConfig) -> dict[str, list[Batch]]:
    batches: dict[str, list[Batch]] = {}
    for name in ("split", "best_fit", "capped"):
        found: list[Batch] = []
        run(variant(data, name), None, 0, 100, 1, lambda step, batch, found=found: found.append(batch))
        batches[name] = found
    return batches


@pytest.mark.parametrize("name", ["split", "best_fit", "capped"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.lists(st.tuples(st.sampled_from([1, 2, 4, 3]), st.integers(0, 5), st.integers(0, 3)), max_size=5))
def test_kills_and_resizes_over_all_stages(data, unbroken, name, jobs) -> None:
    """A job of R ranks trains some steps, saves, trains a few more and is killed: those are trained again."""
    config, expected = variant(data, name), unbroken[name]
    seen: set[int] = set()

    def check(step: int, batch: Batch) -> None:
        seen.add(step)
        assert all(np.array_equal(batch[key], expected[step][key]) for key in batch), (step, jobs)

    state, step = None, 0
    for ranks, saved, lost in [*jobs, (3, 100, 0)]:
        state, step = run(config, state, step, saved, ranks, check)
        run(config, state, step, lost, ranks, check)
    assert seen == set(range(len(expected)))


def open_numbers(numbered: Path, context: int, **options) -> BatchStream:
    entry = {k: options.pop(k) for k in ("max_epochs", "min_length") if k in options}
    data = DataConfig(tokenizer=str(numbered), mix=[MixEntry("numbers", str(numbered), 1.0, **entry)], **options)
    return open_stream(
        data,
        lanes=4,
        lane_ids=[0, 1, 2, 3],
        batch=4,
        context=context,
        chunk_size=16,
        seed=SEED,
        synthetic={"rate": 0.0},
    )


def read_out(stream: BatchStream) -> np.ndarray:
    """All tokens that can be read before a lane has used up its epochs."""
    parts = []
    with pytest.raises(DataError, match="lane . has read max_epochs of every domain"):
        while True:
            parts.append(stream.next_arrays()["tokens"])
    tokens = np.concatenate(parts).ravel()
    return tokens[tokens >= UNIQUE]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contexts=st.lists(st.sampled_from([16, 48, 256, 1024]), min_size=1, max_size=6), size=st.integers(1, 9))
def test_best_fit_reads_every_token_once(numbered: Path, contexts, size) -> None:
    """Over changes of the context: every token of a lane's first documents once, whole documents in order within."""
    state, parts = None, []
    for context in [*contexts, 512, 512, 512]:
        stream = open_numbers(numbered, context, packing="best_fit", packing_buffer=size)
        if state is not None:
            stream.load_state_dict(state)
        batches = [stream.next_arrays() for _ in range(6)]
        for batch in batches:
            inside = np.diff(batch["documents"], axis=1, prepend=-1) == 0
            real = batch["loss_weights"] > 0
            follows = np.roll(batch["tokens"], -1, axis=1)
            assert np.array_equal(
                batch["labels"][:, :-1][inside[:, 1:] & real[:, :-1]], follows[:, :-1][inside[:, 1:] & real[:, :-1]]
            )
        parts += [batch["tokens"].reshape(4, -1) for batch in batches]
        state = json.loads(json.dumps(stream.state_dict()))
    tokens = np.concatenate(parts, axis=1)
    shards = ShardSet(numbered)
    key = seed_key(SEED, "documents", "numbers")
    for lane in range(4):
        mine = tokens[lane][tokens[lane] >= UNIQUE]
        position = state[str(lane)]["domains"]["numbers"]
        expected: Counter[int] = Counter()
        waiting = {document: offset for document, offset in position.get("buffer", [])}
        for document in range(position["document"]):
            row = int(permute(np.array([lane + document * 4]), shards.documents, key)[0])
            ids = shards.document(row).astype(np.int64)
            expected.update(ids[: waiting.get(document, len(ids))].tolist())
        del expected[stream.tokenizer.eos_id]
        assert Counter(mine.tolist()) == expected


def test_best_fit_cuts_fewer_documents(data: DataConfig) -> None:
    """Documents that fit into a sequence are rarely cut; the padding is that of the chunks in both cases."""
    cut, padding = {}, {}
    for packing in ("split", "best_fit"):
        config = dataclasses.replace(data, mix=data.mix[:2], packing=packing)
        stream = open_stream(
            config, lanes=2, lane_ids=[0, 1], batch=8, context=1024, chunk_size=16, seed=1, synthetic={"rate": 0.0}
        )
        pieces = ends = pad = 0
        for _ in range(40):
            batch = stream.next_arrays()
            pieces += int(batch["documents"].max(axis=1).sum()) + 8
            ends += int((batch["tokens"] == stream.tokenizer.eos_id).sum())
            pad += int((batch["tokens"] == stream.tokenizer.pad_id).sum())
        cut[packing], padding[packing] = pieces - ends, pad
    assert cut["best_fit"] < 0.7 * cut["split"]
    assert padding["best_fit"] < 1.3 * padding["split"]


def test_split_refuses_a_position_of_best_fit(data: DataConfig) -> None:
    stream = open_stage(variant(data, "best_fit"), 0)
    stream.next_arrays()
    with pytest.raises(DataError, match="made with data.packing best_fit"):
        open_stage(variant(data, "split"), 0).load_state_dict(stream.state_dict())


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("epochs", [1, 2, 0.5])
def test_epochs_are_capped_to_the_document(numbered: Path, epochs: float, packing: str) -> None:
    """No lane ends before its documents are used up, and none reads on: at most the allowed rows, each as often."""
    stream = open_numbers(numbered, 16, max_epochs=epochs, packing=packing)
    tokens = read_out(stream)
    shards = ShardSet(numbered)
    positions = np.arange(round(epochs * shards.documents))
    allowed: Counter[int] = Counter()
    for row in permute(positions, shards.documents, seed_key(SEED, "documents", "numbers")):
        allowed.update(shards.document(int(row)).astype(np.int64).tolist())
    assert not Counter(tokens.tolist()) - allowed  # the lane that ends first ends the run


def test_a_used_up_domain_leaves_its_share_to_the_others(data: DataConfig) -> None:
    mix = [dataclasses.replace(data.mix[0], max_epochs=0.5), data.mix[2]]
    stream = open_stream(
        dataclasses.replace(data, mix=mix),
        lanes=2,
        lane_ids=[0, 1],
        batch=4,
        context=512,
        chunk_size=16,
        seed=1,
        synthetic={"rate": 0.0},
    )
    domains = np.concatenate([stream.next_arrays()["domains"] for _ in range(40)])
    assert (domains[:4] == 0).any() and (domains[-40:] == 1).all()
    assert stream.epochs()["tales"] == pytest.approx(0.5, abs=0.05)


def test_long_documents_are_chosen_by_their_length(numbered: Path) -> None:
    shards = ShardSet(numbered)
    stream = open_numbers(numbered, 64, min_length=200, max_epochs=1)
    rows = np.flatnonzero(shards.index["length"] >= 200)
    assert stream._domains[0].documents == len(rows) < shards.documents
    wanted = set(np.concatenate([shards.document(int(r)) for r in rows]).tolist())
    assert set(read_out(stream).tolist()) <= wanted
    with pytest.raises(DataError, match="no document of domain numbers .* the longest has 40001"):
        open_numbers(numbered, 64, min_length=50_000)


def test_one_name_is_one_set_of_documents(data: DataConfig) -> None:
    long = [MixEntry("tales", data.tokenizer, 1.0, min_length=100)]
    with pytest.raises(DataError, match="two mixes call different documents 'tales'"):
        open_stage(dataclasses.replace(data, mixes={"long": long}), 0)
    with pytest.raises(DataError, match="max_epochs of tales must be above 0"):
        open_stage(dataclasses.replace(data, mix=[dataclasses.replace(data.mix[0], max_epochs=0)]), 0)
    for change, message in [
        ({"packing": "first_fit"}, "split or best_fit"),
        ({"unreadable": "ignore"}, "stop or skip"),
    ]:
        with pytest.raises(DataError, match=message):
            open_stage(dataclasses.replace(variant(data, "split"), **change), 0)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_unreadable_documents_are_skipped_named_and_counted(data, numbered, tmp_path, packing, capsys) -> None:
    """By recipe only. No wrong token; the count is part of the position."""
    folder = Path(shutil.copytree(numbered, tmp_path / "damaged"))
    shards = ShardSet(folder)
    bad = shards.shard_files[1]
    content = bytearray(bad.read_bytes())
    lost = [row for row in np.flatnonzero(shards.index["shard"] == 1)]
    for row in lost:
        content[int(shards.index[row]["offset"])] ^= 1
    bad.write_bytes(content)
    stream = open_numbers(folder, 64, unreadable="skip", max_epochs=1, packing=packing)
    gone = set(np.concatenate([ShardSet(numbered).document(int(r))[:-1] for r in lost]).tolist())
    assert not set(read_out(stream).tolist()) & gone
    assert set(stream.skipped()) == {str(bad)} and 0 < sum(stream.skipped().values()) <= len(lost)
    assert "skips what it cannot read" in capsys.readouterr().err
    again = open_numbers(folder, 64, unreadable="skip", max_epochs=1, packing=packing)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert again.skipped() == stream.skipped()
    stopping = open_numbers(folder, 64, max_epochs=1, packing=packing)
    with pytest.raises(DataError, match="is damaged"):
        for _ in range(1000):
            stopping.next_arrays()


def test_a_domain_of_which_nothing_can_be_read_ends_the_run(numbered, tmp_path) -> None:
    """Also by ``skip``: a lane would look for a readable document forever."""
    folder = Path(shutil.copytree(numbered, tmp_path / "damaged"))
    shards = ShardSet(folder)
    for number, file in enumerate(shards.shard_files):
        content = bytearray(file.read_bytes())
        for row in np.flatnonzero(shards.index["shard"] == number):
            content[int(shards.index[row]["offset"])] ^= 1
        file.write_bytes(content)
    with pytest.raises(DataError, match="no document of domain numbers can be read: .*another checksum"):
        open_numbers(folder, 64, unreadable="skip").next_arrays()
