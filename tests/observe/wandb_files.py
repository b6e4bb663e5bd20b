"""Reading what wandb writes offline: protobuf records in LevelDB's log format behind a header of seven bytes."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little room for another record in this block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        at += 7 + length
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        parts = body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            yield parts


def history(folder: Path) -> list[dict[str, float]]:
    """What was logged, over all starts of the run in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records(path):
            message = Record()
            message.ParseFromString(data)
            if message.HasField("history"):
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in message.history.item})
    return rows
