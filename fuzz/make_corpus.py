"""Write a starting corpus for the fuzz targets: ``python fuzz/make_corpus.py DIRECTORY``.

Makes one directory per target from the recorded vectors of the original library in tests/data/vectors.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).resolve().parents[1] / "tests" / "data" / "vectors.json"


def seeds(vectors: dict[str, Any]) -> Iterator[tuple[str, str, bytes]]:
    """(target, name, input) in the form that fuzz/invariants.py takes."""
    for record in vectors["encode"]:
        target = "parser_guest" if record["role"] == "host" else "parser_host"
        caps = int(record["effective_peer_caps"], 16) & 0xFF, int(record["effective_own_caps"], 16) & 0xFF
        yield target, record["id"], bytes((*caps, 40)) + bytes.fromhex(record.get("wire", ""))
    for record in vectors["malformed"]:
        stream = bytes.fromhex(record.get("peer_hello") or "") + bytes.fromhex(record.get("input", ""))
        yield "parser_" + record["role"], record["id"], bytes((int(record["own_caps"], 16) & 0xFF, 0, 40)) + stream
    for record in vectors["unserialise"]:
        flags = 2 | (record["role"] == "host")
        yield "unserialize", record["id"], bytes((flags,)) + bytes.fromhex(record["state"])
    for record in vectors["filter_parse"]:
        yield "filter", record["id"], b"\0" + str(record.get("string", "")).encode("latin-1", "replace")


def main(directory: Path) -> None:
    for target, name, data in seeds(json.loads(VECTORS.read_text(encoding="utf-8"))):
        if len(data) > 4096:
            continue
        (directory / target).mkdir(parents=True, exist_ok=True)
        (directory / target / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
