"""Shards behind http and pipes: the same batches, retries, a cache, checksums, and what stays unreadable."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import remote
from data_pipeline.config import DataConfig, MixEntry
from data_pipeline.errors import DataError
from data_pipeline.lanes import BatchStream, open_stream
from data_pipeline.shards import ShardSet, verify


class Server(SimpleHTTPRequestHandler):
    """Serves a folder; the first ``faults[name]`` answers for a file are damaged."""

    faults: Counter[str] = Counter()
    answers: Counter[str] = Counter()

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        data = (Path(self.directory) / name).read_bytes()
        self.answers[name] += 1
        if self.answers[name] <= self.faults[name]:
            if self.answers[name] % 2:
                data = data[: len(data) // 2]  # ends early
            else:
                data = data[:-700] + bytes([data[-700] ^ 1]) + data[-699:]  # a flipped bit
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def url(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HSA_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    Server.faults, Server.answers = Counter(), Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def open_(path: str, **options) -> BatchStream:
    data = DataConfig(tokenizer=path, mix=[MixEntry("all", path, 1.0, domain="*")], **options)
    return open_stream(
        data, lanes=2, lane_ids=[0, 1], batch=2, context=256, chunk_size=16, seed=1, synthetic={"rate": 0.0}
    )


def test_http_and_pipes_give_the_batches_of_the_folder(url: str, shards: Path) -> None:
    expected = [open_(str(shards)).next_arrays()["tokens"]]
    for path in (url, f"pipe:cat {shards}/{{file}}"):
        stream = open_(path)
        cached = {f.name for f in stream._domains[0].shards.path.iterdir()}
        assert not any(name.endswith(".tar") for name in cached)  # a shard is fetched when it is needed
        assert np.array_equal(stream.next_arrays()["tokens"], expected[0])
    assert verify(url)["documents"] == ShardSet(shards).documents


def test_damaged_answers_are_fetched_again_and_good_ones_once(url: str, shards: Path, capsys) -> None:
    for name in ("manifest.json", "index.npy", "tales-000000.tar"):
        Server.faults[name] = 1
    Server.faults["tales-000001.tar"] = 3
    verify(url)
    error = capsys.readouterr().err
    assert "tales-000000.tar of http" in error and "trying again in 0.5 s" in error and "another sha256" in error
    assert Server.answers["tales-000000.tar"] == 2 and Server.answers["tales-000001.tar"] == 4
    before = Counter(Server.answers)
    verify(url)
    again = Server.answers - before
    assert set(again) == {"manifest.json", "tokenizer.json"}  # everything else comes from the cache
    cache = remote.RemoteFolder(url).path
    assert not list(cache.glob("*.tmp"))
    for file in shards.glob("*.tar"):
        assert (cache / file.name).read_bytes() == file.read_bytes()


def test_what_stays_unreadable_stops_or_is_skipped(url: str, shards: Path, capsys) -> None:
    """Named and counted, tried TRIES times and not for every document again."""
    bad = "tales-000001.tar"
    Server.faults[bad] = 10**6
    stream = open_(url)
    with pytest.raises(DataError, match=f"{bad} of http.* could not be fetched in 5 tries: .*check the address"):
        for _ in range(100):
            stream.next_arrays()
    assert Server.answers[bad] == remote.TRIES
    stream = open_(url, unreadable="skip")
    for _ in range(60):
        stream.next_arrays()
    (name,) = stream.skipped()
    assert name.endswith(bad) and stream.skipped()[name] > 2
    assert Server.answers[bad] == 2 * remote.TRIES
    assert "skips what it cannot read: tales-000001.tar of http" in capsys.readouterr().err


def test_addresses_that_lead_nowhere(url: str, tmp_path: Path) -> None:
    for path, message in [
        (f"pipe:cat {tmp_path}/none/{{file}}", "could not be fetched in 5 tries"),
        ("pipe:cat /somewhere", r"write \{file\} in the command"),
        ("nothing://host/shards", "could not be fetched in 5 tries: nothing"),
    ]:
        with pytest.raises(DataError, match=message):
            ShardSet(path)
