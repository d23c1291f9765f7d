"""The global order: independent of readers, kills and stages; nothing lost, nothing twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data_pipeline import shards as shards_module
from data_pipeline.config import DEFAULT_TASKS, TASKS, DataConfig, MixEntry, SyntheticConfig
from data_pipeline.errors import DataError
from data_pipeline.lanes import BatchStream, open_stream
from data_pipeline.permutation import permute, seed_key
from data_pipeline.shards import ShardSet, write_manifest, write_shard

LANES = 12
OPTIONS = {"lanes": LANES, "batch": 24, "chunk_size": 16, "seed": 5, "synthetic": {"rate": 0.3}}
UNIQUE = 5000


def open_(data: DataConfig, ranks: int = 1, rank: int = 0, **changes) -> BatchStream:
    lane_ids = [lane for lane in range(changes.get("lanes", LANES)) if lane % ranks == rank]
    return open_stream(data, **{"lane_ids": lane_ids, "context": 256, **OPTIONS, **changes})


def gather(parts: list[dict[str, np.ndarray]], lanes: int = LANES) -> dict[str, np.ndarray]:
    """One global batch, lane-major, from the batches of R ranks."""
    ranks = len(parts)
    whole = {}
    for name in parts[0]:
        per_lane = parts[0][name].shape[0] * ranks // lanes
        row = parts[0][name].shape[1:]
        out = np.empty((lanes, per_lane, *row), parts[0][name].dtype)
        for rank, part in enumerate(parts):
            out[rank::ranks] = part[name].reshape(-1, per_lane, *row)
        whole[name] = out.reshape(lanes * per_lane, *row)
    return whole


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def unbroken(data: DataConfig) -> list[dict[str, np.ndarray]]:
    stream = open_(data)
    return [stream.next_arrays() for _ in range(12)]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 12]), st.integers(1, 4)), min_size=1, max_size=4))
def test_any_kills_and_resizes_give_the_unbroken_batches(data, unbroken, schedule) -> None:
    """Each entry of the schedule is a job of R ranks that lives for some batches; its state goes through JSON."""
    state, step = None, 0
    for ranks, batches in schedule:
        streams = [open_(data, ranks, rank) for rank in range(ranks)]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        for _ in range(min(batches, len(unbroken) - step)):
            assert same(gather([s.next_arrays() for s in streams]), unbroken[step])
            step += 1
        state = json.loads(json.dumps({k: v for s in streams for k, v in s.state_dict().items()}))


def test_state_is_small_and_pickled_streams_go_on(data, unbroken) -> None:
    stream = open_(data)
    stream.next_arrays()
    assert len(json.dumps(stream.state_dict())) < 600 * LANES
    assert same(pickle.loads(pickle.dumps(stream)).next_arrays(), unbroken[1])
    assert same(stream.next_arrays(), unbroken[1])


def test_another_seed_gives_another_order(data, unbroken) -> None:
    assert not same(open_(data, seed=6).next_arrays(), unbroken[0])


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000, 4097])
def test_permutation_visits_everything_once_per_epoch(size: int) -> None:
    row = permute(np.arange(3 * size), size, key=99)
    for epoch in range(3):
        assert sorted(row[epoch * size : (epoch + 1) * size]) == list(range(size))
    if size > 100:
        assert not np.array_equal(row[:size], row[size : 2 * size])
        assert abs(np.corrcoef(np.arange(size), row[:size])[0, 1]) < 0.2


@pytest.mark.parametrize("size", [1, 3, 100, 1000, 17_123, 10**6, 10**9])
def test_a_block_of_positions_is_what_single_positions_are(size: int) -> None:
    """Many positions are walked through tables, few are not; also across epochs, and far from the start."""
    for start in (0, size - 5, 10**12 + 7):
        positions = max(start, 0) + 16 * np.arange(600)
        block = permute(positions, size, key=5)
        assert np.array_equal(block[::29], [int(permute(np.array([p]), size, key=5)[0]) for p in positions[::29]])


GOLDEN = {
    "split": "bb808f1a96a1b461e4cc90093377f759f4546022626f03f936beb6c11a460dbb",
    "best_fit": "0400bcb215f6f9dab37406c8a126d742bdeaaca00a893d5849a004526747536a",
    "capped": "b9636ea97324caef06312ae1e0b623d45e9e46261567559c3d0c710cea15c82d",
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_order_of_a_seed_never_changes(name: str, tmp_path: Path, tokenizer) -> None:
    """A run goes on with the order it was started with, also after an update of this package: the arrays of 20
    batches, those that the format was made with, and the position after them hash to what they did then."""
    rng = np.random.default_rng(11)
    (tmp_path / "tokenizer.json").write_bytes(Path(tokenizer.path).read_bytes())
    files, rows = [], []
    for domain, median in (("long", 4000), ("short", 60)):
        file = tmp_path / f"{domain}-000000.tar"
        ids = [rng.integers(3, 250, max(1, int(n))) for n in rng.lognormal(np.log(median), 1.0, 300)]
        rows.append(write_shard(file, [({}, x) for x in ids], "uint16"))
        files.append({"file": file.name, "domain": domain, "bytes": file.stat().st_size, "sha256": ""})
    write_manifest(tmp_path, tokenizer, "uint16", files, rows, {})
    path = str(tmp_path)
    mix = [MixEntry("long", path, 3.0), MixEntry("short", path, 1.0, max_epochs=0.5 if name == "capped" else None)]
    data = DataConfig(tokenizer=path, mix=mix, packing="best_fit" if name == "best_fit" else "split")
    stream = open_(data, synthetic={"rate": 0.0}, context=512)
    digest = hashlib.sha256()
    for _ in range(20):
        batch = stream.next_arrays()
        for array in ("documents", "domains", "labels", "loss_weights", "tokens"):
            digest.update(f"{array} {batch[array].dtype} {batch[array].shape}".encode() + batch[array].tobytes())
    digest.update(json.dumps(stream.state_dict(), sort_keys=True).encode())
    assert digest.hexdigest() == GOLDEN[name]


def lane_tokens(numbered: Path, lane: int, lanes: int, seed: int, count: int) -> np.ndarray:
    """What a lane must read from the numbered shards: whole documents in the order of its positions."""
    shards = ShardSet(numbered)
    parts, total, k = [], 0, 0
    while total < count:
        row = int(permute(np.array([lane + k * lanes]), shards.documents, seed_key(seed, "documents", "numbers"))[0])
        parts.append(shards.read(row, 0, int(shards.index[row]["length"])).astype(np.int64))
        total, k = total + len(parts[-1]), k + 1
    return np.concatenate(parts)[:count]


def numbers(numbered: Path) -> DataConfig:
    return DataConfig(tokenizer=str(numbered), mix=[MixEntry("numbers", str(numbered), 1.0)])


def open_numbers(numbered: Path, **changes) -> BatchStream:
    return open_(numbers(numbered), **{"lanes": 4, "batch": 8, "synthetic": {"rate": 0.0}, **changes})


@pytest.mark.parametrize("kept", [1 << 18, 200], ids=["kept", "too long to keep"])
@pytest.mark.parametrize("context", [16, 48, 512, 4096])
def test_every_token_once_in_order_at_any_context(numbered: Path, context: int, kept: int, monkeypatch) -> None:
    """40,000-token documents are split over sequences (2,500 of the shortest), one-token documents get a chunk; labels
    are the next tokens. Documents too long to be kept are read piece by piece."""
    monkeypatch.setattr(shards_module, "WHOLE", kept)
    stream = open_numbers(numbered, context=context)
    batches = [stream.next_arrays() for _ in range(60_000 // (8 * context) + 3)]
    pad = stream.tokenizer.pad_id
    for lane in range(4):
        rows = slice(2 * lane, 2 * lane + 2)
        tokens = np.concatenate([b["tokens"][rows].ravel() for b in batches])
        labels = np.concatenate([b["labels"][rows].ravel() for b in batches])
        weights = np.concatenate([b["loss_weights"][rows].ravel() for b in batches])
        real = tokens != pad
        expected = lane_tokens(numbered, lane, 4, OPTIONS["seed"], int(real.sum()) + 1)
        assert np.array_equal(tokens[real], expected[:-1])
        follows = (
            expected[:-1] != stream.tokenizer.eos_id
        )  # every token but eos has a label: each is predicted exactly once
        assert np.array_equal(labels[real], np.where(follows, expected[1:], 0))
        assert np.array_equal(weights[real] > 0, follows)
        assert not weights[~real].any() and not labels[~real].any()


def test_stage_change_loses_and_repeats_nothing(numbered: Path) -> None:
    """Contexts, batches and synthetic rates change between stages; haystacks are text of the stream, too."""
    state = None
    rows: dict[int, list[np.ndarray]] = {lane: [] for lane in range(4)}
    tasks = {"niah_single": 1.0, "variable_tracking": 1.0}
    for context, batch, rate in [(128, 8, 0.0), (512, 4, 0.5), (64, 16, 0.0), (1024, 4, 1.0), (96, 8, 0.0)]:
        stream = open_numbers(numbered, context=context, batch=batch, synthetic={"rate": 0.0})
        stream.synthetic.rate = rate  # sentence ends of the numbers are undefined, so the check at open is avoided
        if rate:
            stream.tokenizer.sentence_ends = np.zeros(100_000, dtype=bool)
            stream._tasks, stream._task_edges = list(tasks), np.array([0.5])
        if state is not None:
            stream.load_state_dict(state)
        for _ in range(5):
            tokens = stream.next_arrays()["tokens"].reshape(4, -1)
            for lane in range(4):
                rows[lane].append(tokens[lane][tokens[lane] >= UNIQUE])
        state = stream.state_dict()
    for lane in range(4):
        seen = np.concatenate(rows[lane])
        expected = lane_tokens(numbered, lane, 4, OPTIONS["seed"], len(seen) * 2 + 100)
        assert np.array_equal(seen, expected[expected >= UNIQUE][: len(seen)])


def test_packing_rules(data: DataConfig) -> None:
    """Documents ascend and start on chunks, padding belongs to the document before it, labels never cross documents."""
    stream = open_(data, synthetic={"rate": 0.5, "min_length": 64})
    for _ in range(5):
        batch = stream.next_batch()
        tokens, documents = batch.tokens.numpy(), batch.documents.numpy()
        steps = np.diff(documents, axis=1)
        assert (documents[:, 0] == 0).all() and ((steps == 0) | (steps == 1)).all()
        assert (np.nonzero(steps)[1] % 16 == 15).all()
        last = np.ones_like(documents, dtype=bool)
        last[:, :-1] = steps == 1
        inside = ~last[:, :-1] & (batch.loss_weights.numpy()[:, :-1] > 0)
        assert np.array_equal(batch.labels.numpy()[:, :-1][inside], tokens[:, 1:][inside])
        assert (batch.loss_weights.numpy()[:, :-1][steps == 1] == 0).all()
        assert np.array_equal(batch.domains.numpy()[:, 1:][steps == 0], batch.domains.numpy()[:, :-1][steps == 0])
        edges = batch.cu_seqlens(3).tolist()
        assert edges[0] == 0 and edges[-1] == 256 and len(edges) == documents[3].max() + 2
        assert [int(batch.select(slice(3, 4)).documents[0, e]) for e in edges[:-1]] == list(range(len(edges) - 1))


def test_mix_follows_the_weights_in_tokens(data: DataConfig) -> None:
    stream = open_(data, context=512, synthetic={"rate": 0.0})
    counts = np.zeros(8)
    for _ in range(80):
        batch = stream.next_arrays()
        counts += np.bincount(batch["domains"][batch["tokens"] != stream.tokenizer.pad_id], minlength=8)
    assert stream.domain_names == ["tales", "notes", "text", *TASKS]
    assert np.abs(counts[:3] / counts.sum() - [0.5, 0.2, 0.3]).max() < 0.01
    epochs = stream.epochs()
    assert epochs["notes"] > 1 and set(epochs) == {"tales", "notes", "text"}


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_mix_of_ten_million_tokens_at_any_world_size(data: DataConfig, packing: str) -> None:
    """Within 1 % of the weights, of all tokens, and the same to the token for 1, 2, 3 and 4 ranks."""
    found = []
    for ranks in (1, 2, 3, 4):
        counts = np.zeros(3, dtype=np.int64)
        for rank in range(ranks):
            stream = open_(
                dataclasses.replace(data, packing=packing), ranks, rank, context=8192, batch=12, synthetic={"rate": 0.0}
            )
            for _ in range(110):
                batch = stream.next_arrays()
                counts += np.bincount(batch["domains"][batch["tokens"] != stream.tokenizer.pad_id], minlength=3)
        found.append(counts.tolist())
    assert found[1:] == found[:1] * 3 and sum(found[0]) > 10e6
    assert np.abs(np.array(found[0]) / sum(found[0]) - [0.5, 0.2, 0.3]).max() < 0.01


def test_synthetic_rate_is_exact_and_weights_are_the_recipes(data: DataConfig) -> None:
    options = {
        "rate": 0.25,
        "tasks": {"copy": 1.0, "niah_single": 1.0},
        "copy_random": 1.0,
        "text_weight": 0.5,
        "copy_weight": 2.0,
        "answer_weight": 10.0,
    }
    stream = open_(data, synthetic=options)
    domains, weights = [], []
    for _ in range(20):
        batch = stream.next_arrays()
        domains.append(batch["domains"])
        weights.append(batch["loss_weights"])
    rows, weight = np.concatenate(domains), np.concatenate(weights)
    assert abs((rows[:, 0] >= 3).mean() - 0.25) < 0.01
    copied, needle = rows[:, 0] == 3 + TASKS.index("copy"), rows[:, 0] == 3 + TASKS.index("niah_single")
    assert (
        set(np.unique(weight[copied])) == {0.0, 2.0} and (weight[copied] == 2.0).sum(1).tolist() == [128] * copied.sum()
    )
    assert set(np.unique(weight[needle])) == {0.0, 0.5, 10.0}
    assert set(np.unique(weight[rows[:, 0] < 3])) == {0.0, 0.5}


def test_stage_changes_fields_and_recipes_are_omegaconf(data: DataConfig) -> None:
    """A stage's tasks replace the recipe's; a recipe's tasks are not added to the defaults."""
    recipe = OmegaConf.merge(
        OmegaConf.structured(data), {"synthetic": {"rate": 1.0, "tasks": {"copy": 1}, "digits": 6}}
    )
    stream = open_(recipe, synthetic=OmegaConf.create({"rate": 0.5}))
    assert stream._tasks == ["copy"] and stream.synthetic.rate == 0.5 and stream.synthetic.digits == 6
    stream = open_(recipe, synthetic={"tasks": {"niah_single": 2.0}})
    assert stream._tasks == ["niah_single"] and stream.synthetic.rate == 1.0
    assert open_(data, synthetic={"rate": 1.0})._tasks == list(DEFAULT_TASKS)
    pickle.dumps(stream)


def test_named_mix_keeps_positions_and_restarts_its_shares(data: DataConfig) -> None:
    first = open_(data, synthetic={"rate": 0.0})
    for _ in range(3):
        first.next_arrays()
    second = open_(data, mix="long", synthetic={"rate": 0.0})
    second.load_state_dict(first.state_dict())
    before, after = first.state_dict()["4"]["domains"], second.state_dict()["4"]["domains"]
    assert before == after
    second.next_arrays()
    back = open_(data, synthetic={"rate": 0.0})
    back.load_state_dict(second.state_dict())
    assert back.state_dict()["4"]["domains"]["notes"] == before["notes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 20}, "multiple of 12, such as 24"),
        ({"context": 250}, "chunk size 16"),
        ({"lane_ids": [0, 12]}, "lane ids"),
        ({"mix": "nope"}, "no mix 'nope' in data.mixes; there are long"),
        ({"synthetic": {"rat": 1.0}}, "unknown key 'rat'"),
        ({"synthetic": {"rate": 2.0}}, "data.synthetic.rate"),
        ({"synthetic": {"frequent_names": 1.5, "templates": "wide"}}, "data.synthetic.frequent_names must be between"),
        ({"synthetic": {"frequent_names": 0.5}}, "data.synthetic.frequent_names: only templates wide"),
        ({"synthetic": {"evidence_weight": -0.1}}, "data.synthetic.evidence_weight must be 0 or more, not -0.1"),
        ({"synthetic": {"evidence_context": 64}}, "data.synthetic.evidence_context must be at least the context 256"),
        ({"synthetic": {"rate": "often"}}, "data.synthetic: .*often"),
        ({"synthetic": {"tasks": {"niah": 1.0}}}, "unknown task 'niah'"),
        ({"synthetic": {"tasks": {"copy": -1.0}}}, "must not be negative"),
        ({"synthetic": {"min_length": 1000}}, "min_length"),
        ({"synthetic": {"min_length": 16, "tasks": {"niah_single": 1.0}}}, "min_length is too small for every task"),
        ({"context": 16}, "use a longer context"),
    ],
)
def test_impossible_sizes_are_refused_before_reading(data: DataConfig, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_(data, **changes)


def test_mistakes_in_the_mix(data: DataConfig, shards: Path, tmp_path: Path) -> None:
    path = str(shards)

    def mix(*entries: MixEntry) -> DataConfig:
        return DataConfig(tokenizer=path, mix=list(entries))

    for config, message in [
        (mix(), "data.mix is empty"),
        (mix(MixEntry("tales", path, 0.0)), "data.mix is empty"),
        (mix(MixEntry("tales", path, -1.0)), "weight of tales"),
        (mix(MixEntry("tales", path), MixEntry("tales", path)), "two entries called 'tales'"),
        (mix(MixEntry("web", path)), "no domain 'web' .* it has notes, tales, text"),
        (mix(MixEntry("web", str(tmp_path / "none"))), "no token shards at .*none"),
        (DataConfig(tokenizer=str(tmp_path), mix=data.mix), "no tokenizer at"),
        (
            DataConfig(tokenizer=path, mix=data.mix, mixes={"later": [MixEntry("x", str(tmp_path / "y"))]}),
            "no token shards at .*y",
        ),
        (DataConfig(tokenizer=path, mix=data.mix, readers=0), "data.readers at least 1, not 2 and 0"),
        (DataConfig(tokenizer=path, mix=data.mix, prefetch=-1), "data.prefetch must be 0 or more"),
    ]:
        with pytest.raises(DataError, match=message):
            open_(config)


def test_a_position_of_other_data_or_lanes_is_refused(data: DataConfig, numbered: Path) -> None:
    state = open_(data).state_dict()
    with pytest.raises(DataError, match="seed 5, the run has 6"):
        open_(data, seed=6).load_state_dict(state)
    with pytest.raises(DataError, match="no lane 11"):
        open_(data).load_state_dict({k: v for k, v in state.items() if k != "11"})
    state["0"]["domains"]["tales"]["data"] = "something else"
    with pytest.raises(DataError, match="domain tales .* is not the data of the saved position"):
        open_(data).load_state_dict(state)


def test_whole_folder_as_one_domain(shards: Path) -> None:
    config = DataConfig(tokenizer=str(shards), mix=[MixEntry("all", str(shards), 1.0, domain="*")])
    stream = open_(config, synthetic=SyntheticConfig(rate=0.0))
    stream.next_arrays()
    assert stream._domains[0].documents == ShardSet(shards).documents
