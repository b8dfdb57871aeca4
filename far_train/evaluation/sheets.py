"""Contact sheets with mask overlays, loss curves, evaluation plots, and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from ..data.captions import Name
from ..data.concepts import Composite
from ..data.images import to_pil
from ..utils.files import replacing, write_text
from .detect_and_compare import Evaluation

# Of concepts, in order; class subjects are grey. Distinguishable for colour-blind readers (Okabe & Ito).
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0))
CLASS_COLOUR = (150, 150, 150)
GROUND, WRITING = (32, 32, 32), (224, 224, 224)  # of contact sheets: white would glare in a dark front end


def overlay(composite: Composite, names: Sequence[Name]) -> Image.Image:
    """A composite with every mention's mask tinted and outlined in its concept's colour."""
    return tinted(
        composite.image,
        [m.mask for m in composite.mentions],
        [names.index(m.name) if m.name in names else None for m in composite.mentions],
    )


def tinted(image: Tensor, masks: Sequence[Tensor], concepts: Sequence[int | None]) -> Image.Image:
    """A picture [H, W, 3] with masks [H, W] tinted and outlined, each in the colour of its concept's number."""
    pixels = np.array(to_pil(image), dtype=np.float32)
    for mask, concept in zip(masks, concepts):
        colour = CLASS_COLOUR if concept is None else COLOURS[concept % len(COLOURS)]
        share = mask.float().numpy()
        pixels += 0.25 * share[..., None] * (np.array(colour, np.float32) - pixels)
        inside = share > 0.5
        width = max(round(0.006 * len(share)), 1)
        rim = ndimage.binary_dilation(inside, iterations=width) & ~inside
        pixels[rim] = colour
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def checkerboard(image: Tensor, mask: Tensor) -> Image.Image:
    """A subject [H, W, 3] with its mask [H, W] on a checkerboard."""
    rows, columns = np.indices(mask.shape) // max(max(mask.shape) // 32, 1)
    board = torch.from_numpy(np.where((rows + columns) % 2, 0.85, 0.65)).float()[..., None].expand(*mask.shape, 3)
    return to_pil(board + mask[..., None] * (image - board))


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str] = (), *, columns: int | None = None, cell: int = 256
) -> Image.Image:
    """Pictures in a grid of cells of ``cell`` pixels, each with its label below, on a dark ground.

    ``columns``: by default as :func:`full_columns` has them.
    """
    font = ImageFont.load_default(max(cell // 18, 11))
    lines = [textwrap.wrap(label, max(cell // 7, 12))[:3] for label in labels]
    lines += [[]] * (len(pictures) - len(lines))
    line_height = max(cell // 18, 11) + 4
    text_height = line_height * max((len(x) for x in lines), default=0) + 8 * bool(labels)
    columns = min(columns or full_columns(len(pictures)), max(len(pictures), 1))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + text_height + 8) + 8), GROUND)
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = 8 + i % columns * (cell + 8), 8 + i // columns * (cell + text_height + 8)
        scale = cell / max(picture.size)
        width, height = (max(round(side * scale), 1) for side in picture.size)
        fitted = picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
        for k, line in enumerate(lines[i]):
            draw.text((x, y + cell + 4 + k * line_height), line, WRITING, font)
    return sheet


def full_columns(count: int) -> int:
    """Of 3 to 5 columns those that leave the fewest cells empty; of equals 4, then 5."""
    return min((4, 5, 3), key=lambda columns: -count % columns)


def dataset_sheet(
    composites: Sequence[Composite], names: Sequence[Name], *, columns: int | None = None, cell: int = 256
) -> Image.Image:
    """Contact sheet of composites with coloured masks, layout and caption."""
    labels = [f"[{c.layout}] {c.caption}" for c in composites]
    return contact_sheet([overlay(c, names) for c in composites], labels, columns=columns, cell=cell)


def picture_grid(
    pictures: Iterable[Tensor], labels: Sequence[str] = (), *, columns: int | None = None, cell: int = 256
) -> Image.Image:
    """Contact sheet of pictures, each [H, W, 3]."""
    return contact_sheet([to_pil(p) for p in pictures], labels, columns=columns, cell=cell)


def loss_curves(metrics: Sequence[Mapping[str, Any]], size: tuple[int, int] = (900, 420)) -> Image.Image:
    """Plot the denoising, prior and refinement losses over the steps, with their running means.

    The losses are unweighted: without their weights and schedules in the total loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    kinds = [k for k in ("denoising", "prior", "refinement") if any(m.get(k) for m in metrics)]
    for i, (kind, axes) in enumerate(zip(kinds, figure.subplots(1, max(len(kinds), 1), squeeze=False)[0])):
        steps = [m["step"] for m in metrics]
        values = np.array([m.get(kind, np.nan) for m in metrics], dtype=np.float64)
        colour = tuple(c / 255 for c in COLOURS[i])
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(values), color=colour, linewidth=1.8)
        axes.set(title=f"{kind} (unweighted)", xlabel="step")
        axes.grid(alpha=0.2)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def evaluation_plot(evaluation: Evaluation, size: tuple[int, int] = (900, 380)) -> Image.Image:
    """Plot the similarities of found subjects and reference photos, and each concept's presence and mixing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    found, photos, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    labels = [n.token or n.noun for n in evaluation.names]
    places = range(len(labels))
    for axes, title, matrix in ((found, "found", evaluation.similarity), (photos, "photos", evaluation.truth)):
        axes.imshow(matrix.nan_to_num(0.0).numpy(), vmin=0, vmax=1, cmap="viridis")
        for i, k in itertools.product(places, places):
            colour = "black" if matrix[i, k] > 0.6 else "white"
            said = "none" if matrix[i, k].isnan() else f"{matrix[i, k]:.2f}"
            axes.text(k, i, said, ha="center", va="center", color=colour)
        axes.set(title=f"{title}, against photos", xticks=places, yticks=places)
        axes.set_xticklabels(labels, rotation=30, ha="right")
        axes.set_yticklabels(labels)
    for shift, kind, values in ((-0.2, "present", evaluation.presence), (0.2, "mixing", evaluation.mixing)):
        colour = tuple(c / 255 for c in COLOURS[kind == "mixing"])
        bars.bar([p + shift for p in places], np.nan_to_num(values), 0.38, label=kind, color=colour)
    bars.set(title="per concept", ylim=(0, 1.02), xticks=places)
    bars.set_xticklabels(labels, rotation=30, ha="right")
    bars.legend()
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def running_mean(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Mean over a window that ends at each point and covers ``share`` of the curve.

    Non-finite values are ignored; a window without finite values gives NaN.
    """
    window = max(int(len(values) * share), 1)
    finite = np.isfinite(values)
    sums, counts = np.cumsum(np.where(finite, values, 0)), np.cumsum(finite)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a sheet as JPEG or PNG by its suffix, atomically."""
    with replacing(path) as temporary:
        sheet.save(temporary, quality=90)


@dataclass
class Page:
    """A self-contained HTML page: sections of text and embedded pictures."""

    title: str
    parts: list[str] = field(default_factory=list)

    def section(self, heading: str, text: str = "") -> None:
        self.parts.append(f"<h2>{html.escape(heading)}</h2>" + (f"<p>{html.escape(text)}</p>" if text else ""))

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
        self.parts.append(f"<table><tr>{''.join(f'<th>{html.escape(c)}</th>' for c in head)}</tr>{lines}</table>")

    def picture(self, picture: Image.Image, caption: str = "") -> None:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=88)
        data = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(caption)
        self.parts.append(
            f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def save(self, path: Path) -> None:
        style = (
            "body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}"
            "img{max-width:100%;border-radius:6px}figure{margin:1rem 0}figcaption{color:#666;font-size:.9em}"
            "h2{margin-top:2.5rem;border-bottom:1px solid #ddd}"
            "table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:left;border-bottom:1px solid #ddd}"
        )
        title = html.escape(self.title)
        write_text(
            path,
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><style>{style}</style><h1>{title}</h1>{''.join(self.parts)}</html>\n",
        )
