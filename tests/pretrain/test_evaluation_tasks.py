"""Retrieval tasks and perplexity, asked of engines whose abilities are known: one reads the prompt as text, one knows
nothing, one sees only so many tokens back."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.config import MixEntry
from data_pipeline.errors import DataError
from data_pipeline.shards import write_manifest, write_shard
from data_pipeline.tokenizer import Tokenizer, train_bpe
from pretrain.errors import RecipeError
from pretrain.evaluation import plots, report, retrieval
from pretrain.evaluation.haystack import Haystack
from pretrain.evaluation.heldout import load_held_out, unigram_counts
from pretrain.evaluation.niah import needle_accuracy, run_niah
from pretrain.evaluation.ppl import mean_nll, position_buckets, run_ppl, sequence_ends, sequence_starts, unigram_nll
from pretrain.evaluation.retrieval import run_task
from pretrain.evaluation.ruler import SHARED, parse_tasks, run_ruler

HAY = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it at night. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_bpe([HAY, " The magic number for apple is 1234. What is the special number for"], 300))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def hay(tokenizer):
    return np.array(tokenizer.encode(HAY * 60), dtype=np.int32)


class Fake:
    """Says a fixed continuation per prompt, then end tokens. Its vocabulary is padded with a tempting entry."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer = tokenizer, answer
        self.shapes = []

    def reset(self):
        self.queue = []

    def prefill(self, tokens):
        assert tokens.dtype == torch.int64
        self.shapes.append(tuple(tokens.shape))
        self.queue = [list(self.answer(row.tolist())) for row in tokens]
        return self._logits()

    def decode(self, tokens):
        return self._logits()

    def _logits(self):
        logits = torch.zeros(len(self.queue), self.tokenizer.vocab_size + 3)
        logits[:, -1] = 2.0
        for row, queue in enumerate(self.queue):
            logits[row, queue.pop(0) if queue else self.tokenizer.eos_id] = 1.0
        return logits


class Reader(Fake):
    """Answers needle questions by reading the last ``sight`` tokens as text; knows nothing of how they were made."""

    def __init__(self, tokenizer, sight=None):
        super().__init__(tokenizer, self.read)
        self.sight = sight

    def read(self, ids):
        whole = self.tokenizer.decode(ids)
        asked = re.search(r"(?:number for|code of) (\w+) is$|(\w+) has the number$", whole)
        key = asked[1] or asked[2]
        seen = self.tokenizer.decode(ids[-self.sight :] if self.sight else ids)
        found = re.search(rf"(?:(?:number|numbers|code) (?:for|of) {key} is:?|{key} has the number) (\d+)\.", seen)
        return self.tokenizer.encode(f" {found[1]}") if found else []


class Oracle(Fake):
    """Knows every sample that was built, whatever the task."""

    def __init__(self, tokenizer, monkeypatch, spoil=lambda ids: ids):
        known = {}
        build = retrieval.build_sample

        def remember(*args, **kwargs):
            sample = build(*args, **kwargs)
            known[sample.tokens[: sample.prompt_length].tobytes()] = sample.answer_ids().tolist()
            return sample

        monkeypatch.setattr(retrieval, "build_sample", remember)
        super().__init__(tokenizer, lambda ids: spoil(known[np.array(ids, dtype=np.int32).tobytes()]))


@pytest.mark.parametrize("templates", ["train", "eval"])
def test_a_reader_finds_every_needle_at_every_depth(tokenizer, hay, templates):
    engine = Reader(tokenizer)
    result = run_niah(engine, tokenizer, hay, lengths=[160, 301], depths=3, samples=4, templates=templates)
    assert [(cell.length, cell.depth) for cell in result.cells] == [(n, d) for n in (160, 301) for d in (0, 0.5, 1)]
    assert all(cell.tally.n == 4 and cell.tally.accuracy == 1 for cell in result.cells)
    assert result.by_length()[301].n == 12


def test_a_forgetful_engine_gets_nothing_and_a_short_sighted_one_the_late_needles(tokenizer, hay):
    nothing = run_niah(Fake(tokenizer, lambda ids: []), tokenizer, hay, lengths=[200], depths=2, samples=5)
    assert nothing.by_length()[200].accuracy == 0
    near = run_niah(Reader(tokenizer, sight=150), tokenizer, hay, lengths=[400], depths=[0.0, 0.4, 1.0], samples=5)
    assert [cell.tally.accuracy for cell in near.cells] == [0, 0, 1]


def test_answers_must_be_exact_and_must_end(tokenizer, hay, monkeypatch):
    for spoil in (lambda ids: ids[:-1], lambda ids: [*ids, ids[-1]], lambda ids: ids[::-1] * 2):
        with monkeypatch.context() as patch:
            engine = Oracle(tokenizer, patch, spoil)
            result = run_niah(engine, tokenizer, hay, lengths=[160], depths=1, samples=6)
        tally = result.by_length()[160]
        assert tally.correct == 0 and 0 <= tally.token_accuracy < 1
        kept = result.to_json()["mistakes"]
        assert len(kept) == retrieval.MISTAKES and all(mistake["length"] == 160 for mistake in kept)
        assert all(len(mistake["wanted"]) == 4 and mistake["answered"] != mistake["wanted"] for mistake in kept)


def test_batches_hold_equal_lengths_and_keep_to_the_token_budget(tokenizer, hay):
    engine = Reader(tokenizer)
    run_niah(engine, tokenizer, hay, lengths=[160, 300], depths=2, samples=6, batch=5, token_budget=600)
    rows = {length: [b for b, n in engine.shapes if length - 40 < n < length] for length in (160, 300)}
    assert sum(rows[160]) == sum(rows[300]) == 12
    assert max(rows[160]) == 3 and max(rows[300]) == 2


def test_a_sample_does_not_depend_on_batch_or_neighbours(tokenizer, hay):
    def prompts(**options):
        seen = set()
        engine = Fake(tokenizer, lambda ids: seen.add(tuple(ids)) or [])
        run_niah(engine, tokenizer, hay, **options)
        return seen

    few = prompts(lengths=[160], depths=[0.5], samples=2, batch=1)
    assert len(few) == 2
    assert few <= prompts(lengths=[160, 200], depths=[0.0, 0.5], samples=4, batch=3)
    assert not few & prompts(lengths=[160], depths=[0.5], samples=4, seed=1)


@pytest.mark.parametrize("templates", ["train", "eval"])
def test_needle_distance_is_exact(tokenizer, hay, templates):
    builder = retrieval._Builder("niah_single", tokenizer, Haystack(hay), 400, 1, templates, {}, [7, 400])

    def after_needle(distance):
        sample = builder.at_distance(distance)
        prompt = sample.tokens[: sample.prompt_length].tolist()
        value = sample.answer_ids().tolist()[-4:]  # the digits, without the token of the space
        end = max(i for i in range(len(prompt)) if prompt[i : i + 4] == value) + 5  # digits and full stop
        return prompt[end:]

    question = after_needle(0)
    assert re.match(r" (The magic number|What is)", tokenizer.decode(question))
    for distance in (1, 2, 17, 100, 255):
        rest = after_needle(distance)
        assert len(rest) == distance + len(question)
        assert rest[distance:] == question
        assert tokenizer.decode(rest[:distance]) in HAY * 60


def test_distances_replace_depths_in_the_runner(tokenizer, hay):
    engine = Reader(tokenizer, sight=200)
    result = run_niah(engine, tokenizer, hay, lengths=[400], distances=[100, 250], samples=5)
    assert [(cell.depth, cell.distance, cell.tally.accuracy) for cell in result.cells] == [
        (None, 100, 1.0),
        (None, 250, 0.0),
    ]
    with pytest.raises(RecipeError, match="too few for a needle 390 tokens"):
        run_niah(engine, tokenizer, hay, lengths=[400], distances=[390], samples=1)
    with pytest.raises(RecipeError, match="several needles"):
        run_task(engine, tokenizer, hay, task="niah_multikey", lengths=[400], distances=[9], samples=1)


def test_probe_is_the_same_measurement(tokenizer, hay):
    tally = needle_accuracy(Reader(tokenizer), tokenizer, hay, "niah.single@256", samples=6)
    assert (tally.n, tally.accuracy) == (6, 1.0)
    short = Reader(tokenizer, sight=170)
    assert needle_accuracy(short, tokenizer, hay, "niah.single@320:64", samples=3).accuracy == 1
    assert needle_accuracy(short, tokenizer, hay, "niah.single@320:200", samples=3).accuracy == 0
    spread = needle_accuracy(short, tokenizer, hay, "niah.single@512", samples=12)
    assert 0 < spread.accuracy < 1  # needles lie at all depths


def test_every_task_runs_and_a_perfect_memory_solves_it(tokenizer, hay, monkeypatch):
    engine = Oracle(tokenizer, monkeypatch)
    result = run_ruler(engine, tokenizer, hay, lengths=[400, 512], samples=3)
    assert list(result.tasks) == list(SHARED)
    for task in result.tasks.values():
        assert all(tally.accuracy == 1 and tally.n == 3 for tally in task.by_length().values())
    assert result.to_json()["tasks"]["copy"]["lengths"][0]["accuracy"] == 1


def test_multi_query_asks_for_two_of_six(tokenizer, hay):
    prompts = []
    engine = Fake(tokenizer, lambda ids: prompts.append(tokenizer.decode(ids)) or [])
    run_ruler(engine, tokenizer, hay, tasks=["niah_multiquery"], lengths=[500], samples=3)
    for prompt in prompts:
        assert len(re.findall(r"\d{4}", prompt)) == 6


def test_copy_is_judged_by_its_first_tokens(tokenizer, hay, monkeypatch):
    wrong_late = Oracle(tokenizer, monkeypatch, lambda ids: [*ids[: retrieval.MAX_ANSWER_TOKENS], 9, 9])
    result = run_task(wrong_late, tokenizer, hay, task="copy", lengths=[400], samples=2)
    assert result.by_length()[400].accuracy == 1


@pytest.mark.parametrize(
    "options,message",
    [
        ({"task": "niah_simple"}, "unknown task 'niah_simple': known are niah_single"),
        ({"lengths": [20]}, "cannot evaluate niah_single at 20 tokens: .*needs at least"),
        ({"lengths": [130], "chunk_size": 64}, "chunk size"),
        ({"samples": 0}, "at least one sample"),
        ({"depths": 0}, "at least one depth"),
        ({"templates": "test"}, "unknown templates"),
    ],
)
def test_impossible_questions_are_the_users_mistake(tokenizer, hay, options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        run_niah(Reader(tokenizer), tokenizer, hay, **{"lengths": [200], "samples": 1, **options})
    assert caught.value.exit_status == 2


def test_task_names():
    assert parse_tasks(None, shared=True) == list(SHARED)
    assert parse_tasks("copy, niah_single") == ["copy", "niah_single"]
    with pytest.raises(RecipeError, match="unknown task 'qa'"):
        parse_tasks("qa")


def test_result_reports_repeated_hay(tokenizer, hay, tmp_path):
    result = run_niah(Reader(tokenizer), tokenizer, hay[:300], lengths=[200, 900], depths=2, samples=2)
    value = result.to_json()
    assert [item["haystack_repeats"] for item in value["lengths"]] == [1, 3]
    table = report.niah_table(result)
    assert "was repeated at 900" in table and "100.0" in table and "[51-100]" in table


# --------------------------------------------------------------------------------------------------- perplexity


class Scorer:
    """Loses 1 + 1/p nats on the token at position p."""

    def __init__(self):
        self.shapes = []
        self.read = []

    def reset(self):
        pass

    def score(self, tokens, last=None):
        self.shapes.append(tuple(tokens.shape))
        self.read.append(tokens)
        p = torch.arange(tokens.shape[1] - last if last else 1, tokens.shape[1], dtype=torch.float32)
        return (1 + 1 / p).expand(len(tokens), -1)


def test_perplexity_by_position(tokenizer, hay):
    scorer = Scorer()
    result = run_ppl(scorer, tokenizer, hay, contexts=[64, 256], batch=4, token_budget=600)
    assert {rows for rows, length in scorer.shapes if length == 256} == {2, hay.size // 256 % 2 or 2}
    short, long = result.contexts
    assert (short.sequences, long.sequences) == (hay.size // 64, hay.size // 256)
    assert [(b.start, b.end) for b in short.buckets] == [(1, 16), (16, 24), (24, 32), (32, 48), (48, 64)]
    for bucket in long.buckets:
        p = np.arange(bucket.start, bucket.end)
        assert bucket.mean.nll == pytest.approx(float((1 + 1 / p).mean()), rel=1e-5)
        assert bucket.mean.low <= bucket.mean.nll <= bucket.mean.high
    assert long.overall.n == long.sequences * 255
    text = sum(len(tokenizer.decode(hay[i * 64 + 1 : i * 64 + 64]).encode()) for i in range(short.sequences))
    assert short.bits_per_byte == pytest.approx(short.overall.nll * short.overall.n / math.log(2) / text, rel=1e-5)
    value = result.to_json()
    assert value["unigram"] is None
    assert value["contexts"][0]["perplexity"] == pytest.approx(math.exp(short.overall.nll))


def test_the_same_tokens_behind_every_context(tokenizer, hay):
    scorer = Scorer()
    result = run_ppl(scorer, tokenizer, hay, contexts=[64, 256], sequences=5, last=16, reference=256)
    short, long = (torch.cat([x for x in scorer.read if x.shape[1] == length]) for length in (64, 256))
    assert short.shape[0] == long.shape[0] == 5 and torch.equal(short, long[:, -64:])
    ends = sequence_ends(hay.size, 256, 16, 5)
    assert torch.equal(long, torch.stack([torch.from_numpy(hay[end - 256 : end].astype(np.int64)) for end in ends]))
    first, second = result.contexts
    assert (first.overall.n, [(b.start, b.end) for b in first.buckets]) == (80, [(48, 64)])
    nll = [float((1 + 1 / np.arange(context - 16, context)).mean()) for context in (64, 256)]
    assert [item.overall.nll for item in result.contexts] == pytest.approx(nll)
    assert first.difference.nll == pytest.approx(nll[0] - nll[1], rel=1e-4) and second.difference.nll == 0
    text = sum(len(tokenizer.decode(row[-16:].tolist()).encode()) for row in long)
    assert first.bits_per_byte == pytest.approx(nll[0] * 80 / math.log(2) / text, rel=1e-5)
    assert f"{100 * math.expm1(nll[0] - nll[1]):+.1f} % [" in report.ppl_table(result)
    assert result.to_json()["reference"] == 256
    assert run_ppl(Scorer(), tokenizer, hay, contexts=[64, 256], last=16, reference=1 << 20).reference == 64
    for last in (0, 64):
        with pytest.raises(RecipeError, match=f"--last is {last}: sequences of 64 can score their last 1 to 63"):
            run_ppl(Scorer(), tokenizer, hay, contexts=[64, 256], last=last)


def test_ends_leave_room_for_the_longest_context_and_do_not_overlap():
    assert sequence_ends(1000, 900, 30, None) == [900, 930, 960, 990]
    assert sequence_ends(1000, 900, 30, 2) == [900, 960]
    assert sequence_ends(1000, 1000, 30, None) == [1000]


def test_contexts_that_do_not_fit_are_left_out_not_repeated(tokenizer, hay):
    result = run_ppl(Scorer(), tokenizer, hay, contexts=[64, 1 << 20], sequences=3)
    assert [item.context for item in result.contexts] == [64] and result.contexts[0].sequences == 3
    assert f"{hay.size} tokens" in result.left_out[1 << 20]
    assert "left out 1m" in report.ppl_table(result)
    with pytest.raises(RecipeError, match="less than the shortest context 1m"):
        run_ppl(Scorer(), tokenizer, hay, contexts=[1 << 20])
    with pytest.raises(RecipeError, match="at least 2"):
        run_ppl(Scorer(), tokenizer, hay, contexts=[1])


def test_sequences_are_spread_over_the_text():
    assert sequence_starts(1000, 100, None) == list(range(0, 1000, 100))
    assert sequence_starts(1000, 100, 3) == [0, 300, 600]
    assert sequence_starts(99, 100, 3) == []


def test_buckets_cover_every_position_once():
    for context in (2, 16, 17, 24, 100, 4096):
        buckets = position_buckets(context)
        assert [p for start, end in buckets for p in range(start, end)] == list(range(1, context))


def test_mean_and_its_interval():
    rng = np.random.default_rng(0)
    nll = rng.normal(3.0, 1.0, (40, 128)).astype(np.float32)
    mean = mean_nll(nll)
    half = 1.96 * nll.mean(axis=1).std(ddof=1) / math.sqrt(40)
    assert mean.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert (mean.high - mean.low) / 2 == pytest.approx(half, rel=1e-3)
    assert math.isnan(mean_nll(nll[:1]).low)


def test_unigram_model_by_hand():
    counts = np.array([3, 1, 0, 0])
    tokens = np.array([0, 1, 2])
    assert unigram_nll(counts, tokens) == pytest.approx(-np.log(np.array([4, 2, 1]) / 8).mean())
    with pytest.raises(RecipeError, match="outside the 4 unigram counts"):
        unigram_nll(counts, np.array([4]))


def test_unigram_counts_follow_the_mix(tokenizer, tmp_path):
    def shards(name, *documents):
        folder = tmp_path / name
        folder.mkdir()
        rows = write_shard(folder / f"{name}-000000.tar", (({}, np.array(d)) for d in documents), "uint16")
        file = folder / f"{name}-000000.tar"
        shard = {"file": file.name, "domain": name, "bytes": file.stat().st_size, "sha256": ""}
        write_manifest(folder, tokenizer, "uint16", [shard], [rows], {})
        return str(folder)

    a, b = shards("a", [2, 2, 3, 0], [2, 0]), shards("b", [5, 0])
    mix = [MixEntry("a", a, weight=3), MixEntry("b", b, weight=1)]
    counts = unigram_counts(mix, 8)
    assert counts.sum() == pytest.approx(8)  # tokens read
    assert counts.tolist() == pytest.approx([6 * 2 / 6 + 2 / 2, 0, 6 * 3 / 6, 1, 0, 1, 0, 0])
    limited = unigram_counts(mix[:1], 8, limit=3)
    assert limited.sum() == 3
    with pytest.raises(DataError, match="no token shards"):
        unigram_counts([replace(mix[0], path=str(tmp_path / "nowhere"))], 8)


def test_held_out_text_from_files(tokenizer, tmp_path):
    novel = tmp_path / "novel.txt"
    novel.write_text(HAY)
    assert load_held_out(str(novel), tokenizer).tolist() == tokenizer.encode(HAY)
    lines = tmp_path / "two.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two"}\n')
    joined = load_held_out(str(lines), tokenizer).tolist()
    assert joined == [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two")]
    novel.write_text("")
    for path, message in ((None, "set data.held_out"), (str(novel), "holds no text"), ("/no/file", "no such source")):
        with pytest.raises(ValueError, match=message) as caught:
            load_held_out(path, tokenizer)
        assert caught.value.exit_status == 2


# ------------------------------------------------------------------------------------------------------ pictures


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def picture_width(path):
    return int.from_bytes(path.read_bytes()[16:20], "big")


def test_pictures_are_drawn(tokenizer, hay, tmp_path, monkeypatch):
    grid = run_niah(Reader(tokenizer, sight=150), tokenizer, hay, lengths=[160, 320], depths=3, samples=2)
    far = run_niah(Reader(tokenizer), tokenizer, hay, lengths=[160], distances=[32], samples=2)
    assert is_picture(plots.needle_map(grid, tmp_path / "new" / "map.png", model="m", training_context=160))
    assert is_picture(plots.needle_map(far, tmp_path / "far.png", model="m"))
    tasks = run_ruler(Oracle(tokenizer, monkeypatch), tokenizer, hay, lengths=[300], samples=2).tasks
    near = plots.accuracy_by_length(tasks, tmp_path / "ruler.png", model="m", training_context=256)
    beyond = plots.accuracy_by_length(tasks, tmp_path / "beyond.png", model="m", training_context=1 << 20)
    assert is_picture(near) and is_picture(beyond)
    assert picture_width(beyond) < 1.2 * picture_width(near)  # a mark outside the axes would have stretched the page
    text = run_ppl(Scorer(), tokenizer, hay, contexts=[64, 256], unigram_counts=np.ones(tokenizer.vocab_size))
    assert is_picture(plots.perplexity_by_position(text, tmp_path / "ppl.png", model="m", training_context=64))
    same = run_ppl(Scorer(), tokenizer, hay, contexts=[64, 256], sequences=4, last=16)
    assert is_picture(plots.perplexity_by_context(same, tmp_path / "same.png", model="m", training_context=64))
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays


def test_training_curve_of_a_run(tmp_path):
    rows = [json.dumps({"step": i, "stage": "ab"[i > 20], "loss": "nan" if i == 7 else 9 / i}) for i in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert is_picture(plots.training_curve_of_run(tmp_path, tmp_path / "one.png"))
    probe = '{"step": 20, "name": "niah.single@256", "accuracy": 0.5}\n{"step": 20, "name": "ppl", "nll": 3.1}\n'
    (tmp_path / "evaluations.jsonl").write_text(probe)
    assert is_picture(plots.training_curve_of_run(tmp_path, tmp_path / "two.png"))
    with pytest.raises(ValueError, match="no steps"):
        plots.training_curve_of_run(tmp_path / "empty", tmp_path / "three.png")
