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

# Detectors place edges freely: a subject that the photo crops may get a box that reaches out by this share of a side.
BEYOND_THE_EDGE = 0.05

Box = tuple[float, float, float, float]
Points = tuple[tuple[float, float, int], ...]


def read_prompts(
    count: int,
    boxes: Sequence[Any],
    box_format: str,
    texts: Sequence[str],
    names: Sequence[str] = (),
    negative: Sequence[str] = (),
    index: int = 0,
) -> list[Prompt]:
    """The prompt of each of ``count`` photos, in pixels.

    ``boxes``: values of box sockets (see :func:`read_boxes`), one for all photos or one for each; of several in one
    photo (see :func:`boxes_by_photo`) the one with number ``index`` (from 1), or with 0 that with the best score, or
    the largest if they have no scores. ``texts``: JSON, one for all photos or one for each: a list of points, or a
    mapping from photo numbers (from 1) or ``names`` to points or to {"box": …, "points": …}, which goes before
    ``boxes``. ``negative``: lists of points on the background, likewise. Raises ConfigError and SubjectError.
    """
    frames = boxes_by_photo(boxes, count)
    if frames:
        box_of = [_one_of(frame, box_format, index) for frame in frames]
    else:
        sent = boxes[0] if len(boxes) == 1 and _is_frame(boxes[0]) else boxes
        each = [read_boxes([value], box_format) or [None] for value in sent]
        box_of = _spread([box for found in each for box in found], count, "box", "boxes")
    entries = [_read_json(text) for text in texts]
    if len(entries) == 1 and isinstance(entries[0], Mapping):
        keyed = _by_photo(entries[0], count, names)
        points_of: list[Any] = [None] * count
    else:
        keyed = {}
        points_of = _spread(entries, count, "points", "lists of points")
    negative_of = _spread([_read_json(text) for text in negative], count, "negative_points", "lists of points")
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
        points += tuple((x, y, 0) for x, y, _ in _points(negative_of[i]))
        prompts.append(Prompt(box, points))
    return prompts


def cut_at_edges(prompt: Prompt, width: int, height: int) -> Prompt:
    """The prompt for a photo of this size in pixels, without what a detector's box has beyond the photo's edges.

    A box that reaches out by more than BEYOND_THE_EDGE is of another size of the photo: it stays, and is refused.
    """
    if prompt.box is None:
        return prompt
    limits = (width, height, width, height)
    box = tuple(min(max(side, 0.0), float(limit)) for side, limit in zip(prompt.box, limits))
    far = any(abs(a - b) > BEYOND_THE_EDGE * limit for a, b, limit in zip(prompt.box, box, limits))
    if far or box[0] >= box[2] or box[1] >= box[3]:
        return prompt
    return Prompt(box, prompt.points)


def read_boxes(values: Sequence[Any], box_format: str = BOX_FORMATS[0]) -> list[Box]:
    """The boxes (x0, y0, x1, y1) in values of box sockets: four numbers in ``box_format``, a mapping with named sides,
    JSON text of these, or lists of any of them, in order. Raises ConfigError."""
    return [_one_box(box, box_format) for value in values for box in _boxes_in(value)]


def boxes_by_photo(values: Sequence[Any], count: int) -> list[list[Any]]:
    """The boxes of each photo, any number, as they were sent, where that is told; else nothing.

    All boxes belong to a single photo. Detectors send one value for a batch, [[boxes of photo 1], …], and one for
    each photo of a list, [[boxes]]. Raises ConfigError for another number of photos.
    """
    frames = [_plain(value) for value in values]
    if count == 1:
        own = _boxes_in(frames)
        return [own] if own or any(map(_is_frame, frames)) else []
    if len(frames) == 1 and isinstance(frames[0], list) and all(map(_is_frame, frames[0])):
        frames = frames[0]
    if not any(map(_is_frame, frames)) or (len(frames) == 1 < count):
        return []
    if len(frames) != count:
        raise ConfigError(f"box: there are boxes of {len(frames)} photos for {count} photos; detect in the same photos")
    return [_boxes_in(frame) for frame in frames]


def unscored(frames: Sequence[Sequence[Any]]) -> list[int]:
    """The places of photos with several boxes (see :func:`boxes_by_photo`) that don't tell which one is best."""
    return [i for i, boxes in enumerate(frames) if len(boxes) > 1 and not _scores(boxes)]


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists, also within lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_frame(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not _are_numbers(value, 4)


def _scores(boxes: Sequence[Any]) -> list[float]:
    """The boxes' scores; nothing unless all have one."""
    scores = [box.get("score") if isinstance(box, Mapping) else None for box in boxes]
    return scores if _are_numbers(scores, len(scores)) else []


def _one_of(sent: Sequence[Any], box_format: str, index: int) -> Box | None:
    """Of a photo's boxes the one with this number, the one with the highest score, or the largest."""
    boxes = [_one_box(box, box_format) for box in sent]
    if index:
        return boxes[index - 1] if 0 < index <= len(boxes) else None
    ranks = _scores(sent) or [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    return max(zip(ranks, boxes), key=lambda pair: pair[0], default=(0, None))[1]


def _boxes_in(value: Any) -> list[Any]:
    """Boxes as they were sent, out of lists of any depth."""
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    if isinstance(value, str):
        value = _read_json(value)
    if value is None or (isinstance(value, Mapping) and all(side is None for side in value.values())):
        return []  # a points editor sends the latter for a box that nobody has drawn
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
    if value is None or value == "":
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
    sides = [side for x, y, _ in points for side in (x, y)]
    if all(0 <= side <= 1 for side in sides) and not all(side.is_integer() for side in sides):
        raise ConfigError(
            f"points: {points[0][:2]} is a share of the photo's sides and not pixels; switch 'normalize' off in the "
            "points editor"
        )
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
    called: dict[str, set[int]] = {str(i + 1): {i} for i in range(count)}
    for i, name in enumerate(names[:count]):
        called.setdefault(name, set()).add(i)
    found: dict[int, Any] = {}
    for key, value in entries.items():
        meant = called.get(key, set())
        if not meant:
            raise ConfigError(f"points: there is no photo '{key}'; use the numbers 1 to {count}, or the photos' names")
        if len(meant) > 1:
            which = " and ".join(str(i + 1) for i in sorted(meant))
            raise ConfigError(f"points: '{key}' may be each of the photos {which}; rename them, or leave names open")
        (index,) = meant
        if index in found:
            raise ConfigError(f"points: there are two entries for photo {index + 1}; the second is '{key}'")
        found[index] = value
    return found


def _spread(items: list[Any], count: int, name: str, plural: str) -> list[Any]:
    """One item for all photos, or one for each; None where a photo has none."""
    if all(item is None for item in items):
        return [None] * count
    if len(items) == 1:
        return items * count
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
