"""Where the subject is, as boxes and points of other packs tell it, brought to far_train's prompts. Needs no host."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from ..far_train.data.subjects import Prompt
from ..far_train.utils.errors import ConfigError

BOX_FORMATS = ("x0, y0, x1, y1", "x, y, width, height")

# Mappings say themselves what their numbers mean. Each: left, top, then right and bottom, or width and height.
CORNER_KEYS = (
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("startX", "startY", "endX", "endY"),
    ("left", "top", "right", "bottom"),
)
SIZE_KEYS = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))

POINTS_HELP = (
    'write [[x, y], [x, y, 0]] (0 = not the subject) or, per photo, {"1": [[x, y]], "3": {"box": [x0, y0, x1, y1]}}'
)

Box = tuple[float, float, float, float]
Points = tuple[tuple[float, float, int], ...]


def read_prompts(
    count: int, boxes: Sequence[Any], box_format: str, texts: Sequence[str], names: Sequence[str] = ()
) -> list[Prompt]:
    """The prompt of each of ``count`` photos, in pixels.

    ``boxes``: values of box sockets (see :func:`read_boxes`), one for all photos or one for each; of a detector, which
    sends a list for each photo, the box with the best score, or none. ``texts``: JSON, one for all photos or one for
    each: a list of points, or a mapping from photo numbers (from 1) or ``names`` to points or to {"box": …,
    "points": …}, which goes before ``boxes``. Raises ConfigError and SubjectError.
    """
    box_of = _spread(_detected(boxes, box_format, count) or read_boxes(boxes, box_format), count, "box", "boxes")
    entries = [_read_json(text) for text in texts]
    if len(entries) == 1 and isinstance(entries[0], Mapping):
        keyed = _by_photo(entries[0], count, names)
        points_of: list[Any] = [None] * count
    else:
        keyed = {}
        points_of = _spread([e for e in entries if e is not None], count, "points", "lists of points")
    prompts = []
    for i in range(count):
        box, points = box_of[i], _points(points_of[i])
        if isinstance(keyed.get(i), Mapping):
            entry = keyed[i]
            if set(entry) - {"box", "points"}:
                raise ConfigError(f"points: unknown key in {json.dumps(entry)}; {POINTS_HELP}")
            box = _one_box(entry["box"], BOX_FORMATS[0]) if entry.get("box") else box
            points = _points(entry.get("points"))
        elif i in keyed:
            points = _points(keyed[i])
        prompts.append(Prompt(box, points))
    return prompts


def read_boxes(values: Sequence[Any], box_format: str = BOX_FORMATS[0]) -> list[Box]:
    """The boxes (x0, y0, x1, y1) in values of box sockets: four numbers in ``box_format``, a mapping with named sides,
    JSON text of these, or lists of any of them, in order. Raises ConfigError."""
    return [_one_box(box, box_format) for value in values for box in _boxes_in(value)]


def _detected(values: Sequence[Any], box_format: str, count: int) -> list[Box | None]:
    """The box of each photo where a detector sent a list of boxes for each, of any length; else nothing.

    Detectors send one value for a batch, [[boxes of photo 1], …], and one for each photo of a list, [[boxes]].
    """
    frames = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    if len(frames) == 1 and isinstance(frames[0], list) and all(map(_is_frame, frames[0])):
        frames = frames[0]
    found = [_boxes_in(frame) for frame in frames]
    if all(len(frame) == 1 for frame in found) or not any(map(_is_frame, frames)) or (len(frames) == 1 < count):
        return []
    if len(frames) != count:
        raise ConfigError(f"box: there are boxes of {len(frames)} photos for {count} photos; detect in the same photos")
    return [_best(frame, box_format, i + 1) for i, frame in enumerate(found)]


def _is_frame(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not _are_numbers(value, 4)


def _best(boxes: Sequence[Any], box_format: str, number: int) -> Box | None:
    """Of a photo's boxes the one with the highest score."""
    scores = [box.get("score") if isinstance(box, Mapping) else None for box in boxes]
    if len(boxes) > 1 and not _are_numbers(scores, len(scores)):
        raise ConfigError(f"box: photo {number} has {len(boxes)} boxes without scores; send one, that of the subject")
    best = max(range(len(boxes)), key=lambda i: scores[i] or 0, default=None)
    return None if best is None else _one_box(boxes[best], box_format)


def _boxes_in(value: Any) -> list[Any]:
    """Boxes as they were sent, out of lists of any depth."""
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    if isinstance(value, str):
        value = _read_json(value)
    if value is None:
        return []
    if isinstance(value, Mapping) or _are_numbers(value, 4):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, str) and not any(isinstance(v, Real) for v in value):
        return [box for item in value for box in _boxes_in(item)]
    raise ConfigError(f"box: {value!r} is no box; send four numbers in pixels, {BOX_FORMATS[0]} or {BOX_FORMATS[1]}")


def _one_box(value: Any, box_format: str) -> Box:
    has_size = box_format == BOX_FORMATS[1]
    if isinstance(value, Mapping):
        keys = next((k for k in (*SIZE_KEYS, *CORNER_KEYS) if all(name in value for name in k)), None)
        if keys is None:
            raise ConfigError(f"box: {dict(value)} has no x, y, width, height (or x0, y0, x1, y1)")
        has_size = keys in SIZE_KEYS
        value = [value[name] for name in keys]
    if not _are_numbers(value, 4):
        raise ConfigError(f"box: {value!r} must be four numbers in pixels")
    try:
        x, y, right, bottom = (float(v) for v in value)
    except OverflowError as e:
        raise ConfigError(f"box: {str(value)[:60]} must be four numbers in pixels") from e
    return (x, y, x + right, y + bottom) if has_size else (x, y, right, bottom)


def _points(value: Any) -> Points:
    """Points from [[x, y], [x, y, label], {"x": …, "y": …, "label": …}], or from a single [x, y]."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"points: {json.dumps(value)} is no list of points; {POINTS_HELP}")
    if _are_numbers(value, 2) or _are_numbers(value, 3):
        value = [value]
    points = []
    for point in value:
        if isinstance(point, Mapping):
            point = [point.get("x"), point.get("y"), point.get("label", 1)]
        if not (_are_numbers(point, 2) or _are_numbers(point, 3)):
            raise ConfigError(f"points: {json.dumps(point)} is no point; {POINTS_HELP}")
        try:
            points.append((float(point[0]), float(point[1]), int(point[2]) if len(point) == 3 else 1))
        except (OverflowError, ValueError) as e:  # numbers of hundreds of digits, or a label that is none
            raise ConfigError(f"points: {str(point)[:60]} is no point; {POINTS_HELP}") from e
    return tuple(points)


def _read_json(text: str) -> Any:
    if not isinstance(text, str) or not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"points: {text[:60]!r} is not JSON ({e}); {POINTS_HELP}") from e


def _by_photo(entries: Mapping[str, Any], count: int, names: Sequence[str]) -> dict[int, Any]:
    """Entries by photo number or name → by index."""
    indices = {str(i + 1): i for i in range(count)} | {name: i for i, name in enumerate(names[:count])}
    unknown = [key for key in entries if key not in indices]
    if unknown:
        raise ConfigError(
            f"points: there is no photo '{unknown[0]}'; use the numbers 1 to {count}, or the photos' names"
        )
    return {indices[key]: value for key, value in entries.items()}


def _spread(items: list[Any], count: int, name: str, plural: str) -> list[Any]:
    """One item for all photos, or one for each."""
    if len(items) <= 1:
        return (items or [None]) * count
    if len(items) != count:
        raise ConfigError(
            f"{name}: there are {len(items)} {plural} for {count} photos; give one for all, or one for each"
        )
    return items


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) == count
        and all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
    )
