"""Damage and malice for files, drawn from a seeded generator: what downloads, editors and attackers do to them."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE_TEXTS = (
    "",
    " ",
    "\0",
    "../../evil",
    "/etc/passwd",
    "C:\\Windows\\x",
    "CON",
    "a" * 300,
    "é" * 200,
    "\ud800",
    "{}%s$(id)`id`",
    "<script>",
    "__class__",
    "nan",
    "1e999",
    "9" * 5000,
    "a" * 200_000,
)
HOSTILE_NUMBERS = (0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, 1e308, float("inf"), float("nan"))
DTYPES = ("F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 EVIL").split()


class Raw:
    """Stands in a JSON tree for text that json.dumps could not write, such as a nesting deeper than its own stack."""

    def __init__(self, text: str):
        self.text = text


def hostile_value(rng: random.Random) -> Any:
    """Any JSON value that nobody expects there."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(HOSTILE_TEXTS)
    if kind in (1, 2):
        return rng.choice(HOSTILE_NUMBERS)
    if kind == 3:
        depth = rng.choice((3, 500, 5_000, 100_000))
        return Raw(rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
    if kind == 4:
        return Raw("[" + ",".join(["[]"] * rng.choice((10, 300_000))) + "]")
    return rng.choice((None, True, False, [], {}, [[]], [1, "a", None], {"a": {"b": []}}))


def mutate_json(value: Any, rng: random.Random) -> str:
    """A JSON document with one to three of its values replaced, deleted or added to; as text."""
    raws: dict[str, str] = {}
    tree = {"root": json.loads(json.dumps(value))}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        holder, key = rng.choice(places)
        action = rng.randrange(5)
        if action == 0 and holder is not tree:
            del holder[key]
            continue
        new = hostile_value(rng)
        if isinstance(new, Raw):
            mark = f"raw-{len(raws)}-value"
            raws[json.dumps(mark)] = new.text
            new = mark
        if action == 1 and isinstance(holder, dict) and holder is not tree:
            holder[rng.choice(HOSTILE_TEXTS)] = new
        elif action == 2 and isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice((1, 50)))
        else:
            holder[key] = new
    text = json.dumps(tree["root"])
    for mark, raw in raws.items():
        text = text.replace(mark, raw)
    return text


def _places(value: Any):
    """(container, key) of every value in a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, cut off, or put behind."""
    content = bytearray(data)
    kind = rng.randrange(6)
    if not content or kind == 0:
        return bytes(content[: rng.randrange(len(content) + 1)])
    if kind == 1:
        return bytes(content) + rng.randbytes(rng.choice((1, 8, 4096)))
    if kind == 2:
        start = rng.randrange(len(content))
        content[start : start + rng.choice((1, 16, 1024))] = rng.randbytes(16)
        return bytes(content)
    end = min(len(content), 4096) if kind == 3 else len(content)  # headers stand in front
    for _ in range(rng.choice((1, 1, 4, 64))):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(content)


class Poison:
    """Unpickling this would write a file."""

    def __reduce__(self):
        return Path.write_text, (Path("unpickled"), "x")


def no_model_at_all(rng: random.Random) -> bytes:
    """Files of other kinds under the name of a model."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": Poison()}))
        file.writestr("archive/data/0", bytes(2**20))
    return rng.choice(
        (b"", b"\0" * 8, b"\xff" * 8, b"\0" * 5000, pickle.dumps(Poison()), archive.getvalue(), b"<html>404</html>")
    )


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: str | dict[str, Any], body: bytes, size: int | None = None) -> bytes:
    """The inverse of :func:`split`; ``size`` lies about the header's length."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def mutate_safetensors(data: bytes, rng: random.Random, metadata_key: str | None = None) -> bytes:
    """A safetensors file with its bytes, header, tensors or metadata changed; ``metadata_key`` holds JSON."""
    header, body = split(data)
    names = [k for k in header if k != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    start, stop = entry["data_offsets"]

    def bad_shape() -> bytes:
        own = entry["shape"]
        shapes = ([], [0], [0, 2**40], [-1], [2**62, 2], own[::-1], [1, *own], [stop - start], "a", None)
        entry["shape"] = rng.choice(shapes)
        return join(header, body)

    def reshaped() -> bytes:
        count = (stop - start) // {"F16": 2, "F32": 4}.get(entry["dtype"], 1)
        entry["shape"] = rng.choice(([count], [count, 1], [1, count], [1, 1, count]))
        return join(header, body)

    def bad_dtype() -> bytes:
        entry["dtype"] = rng.choice(DTYPES)
        return join(header, body)

    def bad_offsets() -> bytes:
        entry["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [stop, start], [start, stop + 8], [-8, 8], [0]))
        return join(header, body)

    def poisoned_values() -> bytes:
        pattern = bytes.fromhex(rng.choice(("00fe007e", "007c007c", "0000c07f", "000080ff", "ffff7f7f")))
        place = start + rng.randrange(max((stop - start) // 4, 1)) * 4
        return join(header, body[:place] + pattern + body[place + 4 :])

    def renamed() -> bytes:
        header[rng.choice((*HOSTILE_TEXTS, "delta.x", "embedding.<x>", name.upper()))] = header.pop(name)
        return join(header, body)

    def removed() -> bytes:
        del header[name]
        return join(header, body[:start] + body[stop:]) if name == names[-1] else join(header, body)

    def foreign() -> bytes:
        new = rng.choice(("lora_unet_down.weight", "delta.evil", "__class__", "model.diffusion_model.x", "\0"))
        header[new] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [len(body), len(body) + 16]}
        return join(header, body + bytes(16))

    def doubled() -> bytes:
        text = json.dumps(header)
        return join(text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}", body)

    def header_length() -> bytes:
        return join(header, body, rng.choice((0, 1, 7, 2**20, 2**27, 2**31, 2**40, 2**63, 2**64 - 1)))

    def huge_header() -> bytes:
        padding = rng.choice((10**6, 18 * 10**6))
        return join(json.dumps(header) + " " * padding, body)

    def many_metadata() -> bytes:
        header["__metadata__"] = header.get("__metadata__", {}) | {str(i): "" for i in range(50_000)}
        return join(header, body)

    def metadata() -> bytes:
        about = header.setdefault("__metadata__", {})
        if metadata_key is None or rng.random() < 0.2:
            header["__metadata__"] = rng.choice(({}, None, [], {"far": 3}, {"format": "np"}, "text"))
            return join(header, body)
        if rng.random() < 0.15:
            about[metadata_key] = rng.choice(HOSTILE_TEXTS)
        else:
            about[metadata_key] = mutate_json(json.loads(about[metadata_key]), rng)
        return join(header, body)

    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    if rng.random() < 0.05:
        return no_model_at_all(rng)
    kinds: list[Callable[[], bytes]] = [
        bad_shape, reshaped, bad_dtype, bad_offsets, poisoned_values, renamed, removed, foreign, doubled, header_length,
        huge_header, many_metadata,
    ]  # fmt: skip
    return rng.choice([*kinds, *[metadata] * (8 if metadata_key else 1)])()
