"""Plain text out of what the packages ship: R data files, HTML, gzipped text."""

from __future__ import annotations

import gzip
import html
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

_STRSXP, _CHARSXP = 16, 9


def read_text(path: Path) -> str:
    """A text file, gunzipped when it ends in .gz; UTF-8, or Latin-1 when it is not valid UTF-8 (old documentation)."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def r_character_vectors(path: Path) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database (``.rdb``), in file order.

    Each entry is a big-endian uint32 length and a zlib stream of R's XDR serialisation, version 2 or 3. Raises
    ValueError for anything but plain character vectors.
    """
    data = path.read_bytes()
    position = 0
    while position < len(data):
        stream = zlib.decompressobj()
        payload = stream.decompress(data[position + 4 :])
        if len(payload) != int.from_bytes(data[position : position + 4], "big"):
            raise ValueError(f"{path} is not an R lazy-load database (entry at byte {position})")
        position = len(data) - len(stream.unused_data)
        yield _character_vector(payload)


def _character_vector(data: bytes) -> list[str]:
    def integer(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "big", signed=True)

    if data[:2] != b"X\n":
        raise ValueError("not an XDR serialisation of R")
    version = integer(2)
    position = 14
    if version == 3:
        position += 4 + integer(position)  # the native encoding's name
    if integer(position) & 0xFF != _STRSXP:
        raise ValueError(f"an R object of type {integer(position) & 0xFF}, not a character vector")
    count = integer(position + 4)
    position += 8
    lines = []
    for _ in range(count):
        if integer(position) & 0xFF != _CHARSXP:
            raise ValueError(f"an R object of type {integer(position) & 0xFF} where a string should be")
        size = integer(position + 4)
        position += 8
        if size < 0:  # NA
            lines.append("")
            continue
        lines.append(data[position : position + size].decode("utf-8"))
        position += size
    return lines


_DROP = re.compile(r"<head\b.*?</head>|<script\b.*?</script>|<style\b.*?</style>|<!--.*?-->", re.I | re.S)
_PRE = re.compile(r"(<pre\b.*?</pre>)", re.I | re.S)
_PARAGRAPH = re.compile(r"</?(?:p|div|h[1-6]|table|ul|ol|dl|blockquote|hr)\b[^>]*>", re.I)
_LINE = re.compile(r"<(?:br|li|tr|dt|dd)\b[^>]*>", re.I)
_CELL = re.compile(r"</t[dh]>", re.I)
_TAG = re.compile(r"<[a-zA-Z/!?][^>]*>")


def html_to_text(source: str) -> str:
    """Readable text of an HTML page: paragraphs and list items on their own lines, <pre> as it is, tags gone."""
    parts = []
    for part in _PRE.split(_DROP.sub(" ", source)):
        if part[:4].lower() == "<pre":
            parts.append("\n\n" + _TAG.sub("", part) + "\n\n")
        else:
            part = re.sub(r"\s+", " ", part)
            part = _CELL.sub(" ", _LINE.sub("\n", _PARAGRAPH.sub("\n\n", part)))
            parts.append(_TAG.sub("", part))
    return tidy(html.unescape("".join(parts)))


def tidy(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line, one newline at the end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n +(?=\S)", lambda m: m.group() if len(m.group()) > 2 else "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
