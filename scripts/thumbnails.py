#!/usr/bin/env python3
"""Draw the templates' thumbnails and the help pages' pictures from the small drawn world. Needs no ComfyUI.

    python scripts/thumbnails.py             # workflows/*.jpg, and web/docs/*.jpg of nodes that show pictures
    python scripts/thumbnails.py DEMO_FOLDER # and those that the small models draw, with the weights of a finished demo

The template browser shows squares of about 220 pixels, in which a graph can't be read: these show what goes in and what
the template does with it. No picture of the first kind is a model's output.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from far_train.data.captions import join_phrases  # noqa: E402
from far_train.data.concepts import Background, ClassPicture, Concept  # noqa: E402
from far_train.data.folders import list_photos  # noqa: E402
from far_train.data.fusion import ConceptFusion  # noqa: E402
from far_train.data.images import load_photo, to_pil  # noqa: E402
from far_train.data.settings import FusionConfig  # noqa: E402
from far_train.evaluation.attention_focus import attention_maps, heat_over  # noqa: E402
from far_train.evaluation.detect_and_compare import compare_picture, read_references  # noqa: E402
from far_train.evaluation.sheets import COLOURS, checkerboard, contact_sheet, dataset_sheet, overlay, tinted  # noqa: E402
from far_train.mini.identity import Identity  # noqa: E402
from far_train.mini.likeness import OracleEncoder  # noqa: E402
from far_train.mini.scenery import PLACES  # noqa: E402
from far_train.mini.shipped import DRAWING, SIZE, SUBJECTS, small_base, small_oracle  # noqa: E402
from far_train.mini.world import empty_scene, reference_photos, render_scene  # noqa: E402
from far_train.models.apply import apply_weights  # noqa: E402
from far_train.models.conditioning import plain_vocabulary  # noqa: E402
from far_train.models.sampling import draw_pictures  # noqa: E402
from far_train.models.weights import FarWeights  # noqa: E402

WORKFLOWS = REPOSITORY / "workflows"
CELL, GAP = 256, 12
SIDE = 2 * CELL + GAP
BADGE = 62  # pixels at the top where ComfyUI writes "Node graph" on the left
BYTES = 60_000
HELP = REPOSITORY / "web" / "docs"
DOGS = {
    "<corgi-dog>": Identity("dog", "orange", "yellow", "plain", "none", "floppy"),
    "<chow-dog>": Identity("dog", "blue", "yellow", "plain", "none", "floppy"),
    "<husky-dog>": Identity("dog", "white", "red", "spotted", "hat", "pointed"),
}
OTHER = Identity("dog", "pink", "white", "plain", "none", "pointed")  # a dog that is no concept
SCENES = ("beach", "meadow", "snow", "mountains", "forest")

DRAWN = {token: reference_photos(dog, seed=i, count=4, size=CELL) for i, (token, dog) in enumerate(DOGS.items())}
OTHERS = reference_photos(OTHER, seed=9, count=4, size=CELL)


def fusion_of(tokens: Sequence[str], layouts: dict[str, float] | None, count: int) -> ConceptFusion:
    """A dataset of some of the dogs, in five places, with another dog as class picture."""
    concepts = [Concept(t, "dog", *(tuple(x) for x in zip(*DRAWN[t]))) for t in tokens]
    others = [ClassPicture("dog", image, mask) for image, mask in OTHERS]
    scenes = [Background(empty_scene(name, seed=i, size=CELL)) for i, name in enumerate(SCENES)]
    settings = FusionConfig(size=CELL, count=count, fusion_seed=3, layout_weights=layouts)
    return ConceptFusion(concepts, others, scenes, settings)


def fused(tokens: Sequence[str], layout: str, count: int, tinted: bool = True) -> list[Image.Image]:
    """Composites of one layout, with coloured masks or as they are."""
    fusion = fusion_of(tokens, {layout: 1.0}, count)
    return [overlay(c, fusion.names) if tinted else to_pil(c.image) for c in map(fusion.composite, range(count))]


def photos(token: str, count: int) -> list[Image.Image]:
    return [to_pil(image) for image, _ in DRAWN[token][:count]]


def cut_outs(token: str, count: int) -> list[Image.Image]:
    return [checkerboard(image, mask) for image, mask in DRAWN[token][:count]]


def mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """Four pictures in a square."""
    card = Image.new("RGB", (SIDE, SIDE), "white")
    for i, picture in enumerate(pictures):
        card.paste(picture.resize((CELL, CELL)), (i % 2 * (CELL + GAP), i // 2 * (CELL + GAP)))
    return card


def prompt_card(words: Sequence[str], pictures: Sequence[Image.Image]) -> Image.Image:
    """A prompt with its tokens in the concepts' colours, above two pictures."""
    card = mosaic([Image.new("RGB", (1, 1), (34, 51, 34))] * 2 + list(pictures))
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(34)
    draw.rectangle((0, 0, SIDE, CELL), fill=(34, 51, 34))
    for i, line in enumerate(words):
        colour = COLOURS[list(DOGS).index(line)] if line in DOGS else (230, 240, 230)
        draw.text((20, BADGE + i * 38), line, colour, font)
    return card


def labelled(card: Image.Image, labels: Sequence[str]) -> Image.Image:
    """A card with a word in the lower corner of its left and right half."""
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(40)
    for i, label in enumerate(labels):
        x = i * (CELL + GAP)
        draw.rectangle((x, SIDE - 52, x + CELL, SIDE), fill=(20, 20, 20))
        draw.text((x + 12, SIDE - 50), label, "white", font)
    return card


def cards() -> dict[str, Image.Image]:
    """A thumbnail for each template, by the number that its name begins with."""
    corgi, chow, husky = DOGS
    both = fused((corgi, chow), "pair", 4)
    plain = fused((corgi, chow), "pair", 4, tinted=False)
    return {
        "0": mosaic([*photos(corgi, 1), *photos(chow, 1), *cut_outs(corgi, 1), both[0]]),
        "1": mosaic([*photos(corgi, 1), *cut_outs(corgi, 1), both[1], *fused((corgi, chow), "solo", 1)]),
        "2": mosaic(both),
        "3": prompt_card(["a photo of a", corgi, "dog and a", chow, "dog"], [*cut_outs(corgi, 1), *cut_outs(chow, 1)]),
        "4": mosaic([*photos(corgi, 2)[1:], *cut_outs(corgi, 2)[1:], *fused((corgi,), "beside_prior", 2)]),
        "5": mosaic([*photos(husky, 1), *fused((corgi, chow, husky), "triple", 3)]),
        "6": labelled(mosaic([both[2], plain[2], both[3], plain[3]]), ["with", "without"]),
        "7": labelled(mosaic([both[3], both[0], both[1], both[2]]), ["SDXL"]),
        "8": prompt_card(
            ["SDXL: a photo of a", corgi, "dog and a", chow, "dog"], [*cut_outs(corgi, 2)[1:], *cut_outs(chow, 2)[1:]]
        ),
        "9": labelled(mosaic([*photos(corgi, 2), *cut_outs(corgi, 2)]), ["SAM 3"]),
    }


def help_pictures() -> dict[str, Image.Image]:
    """What some nodes show on themselves, by node id: sheets of the same kind as theirs."""
    corgi, chow, _ = DOGS
    before, after = photos(corgi, 4), cut_outs(corgi, 4)
    names = ["beach-1", "beach-2", "garden-1", "garden-2"]
    fusion = fusion_of((corgi, chow), None, 8)
    composites = [fusion.composite(i) for i in range(8)]
    return {
        "FaR_LoadPhotos": contact_sheet(before, names, cell=180),
        "FaR_MiniPhotos": contact_sheet(
            [*photos(corgi, 2), *photos(chow, 2)], ["rex-0", "rex-1", "max-0", "max-1"], cell=180
        ),
        "FaR_ExtractSubject": contact_sheet([*before, *after], ["photo"] * 4 + ["subject"] * 4, cell=180),
        "FaR_Concept": contact_sheet(after, cell=180),
        "FaR_PriorFromImages": contact_sheet([checkerboard(*o) for o in OTHERS], ["dog"] * 4, cell=180),
        "FaR_ConceptFusion": dataset_sheet(composites, fusion.names, cell=220),
    }


def model_pictures(demo: Path) -> dict[str, Image.Image]:
    """What nodes show that need a model, by node id, with what a demo in the folder ``demo`` learned."""
    base = small_base()
    prompts = [
        "a photo of a red cat with a hat, in the snow",
        "a photo of a blue bird, on the beach",
        "a photo of a yellow robot, in a city at night",
        "a photo of a green cup and a pink dog, in a meadow",
    ]
    phrases, places = zip(*list(PLACES.values())[:8])
    words, dogs, scenes = (
        draw_pictures(base, plain_vocabulary(base), p, DRAWING) for p in (prompts, ["a photo of a dog"] * 4, places)
    )
    names, identities = zip(SUBJECTS["rex"], SUBJECTS["max"])
    scene = render_scene(1, 0, SIZE, identities=identities)
    vocabulary = apply_weights(FarWeights.load(demo / "run-far" / "weights.safetensors"), base)
    caption = f"a photo of {join_phrases(names)}"
    maps = attention_maps(base, vocabulary, scene.image, caption, names, timestep=(400, 500, 600))
    heats = [heat_over(scene.image, heat) for heat in maps]
    places = [f"{caption}, {PLACES[place][0]}" for place in ("beach", "moon", "kitchen", "snow")]
    pictures = draw_pictures(base, vocabulary, places, DRAWING)
    return {
        "FaR_Evaluate": evaluated(pictures, [subject_of(demo, key) for key in ("rex", "max")]),
        "FaR_MiniCheckpoint": contact_sheet([to_pil(p) for p in words], prompts, cell=180),
        "FaR_ClassPrior": contact_sheet([to_pil(p) for p in dogs], ["dog"] * 4, cell=180),
        "FaR_EmptyScenes": contact_sheet([to_pil(p) for p in scenes], phrases, cell=180),
        "FaR_AttentionProbe": contact_sheet(
            [to_pil(p) for p in (scene.image, *heats)], ["the picture", *(n.token for n in names)], cell=240
        ),
    }


def subject_of(demo: Path, key: str) -> Concept:
    """One of the demo's subjects, as it was cut out there."""
    name, _ = SUBJECTS[key]
    photos = [load_photo(path) for path in list_photos(demo / "subjects" / key)]
    return Concept(name.token, name.noun, tuple(p.image for p in photos), tuple(p.mask for p in photos))


def evaluated(pictures: Sequence[Tensor], concepts: Sequence[Concept]) -> Image.Image:
    """Pictures as FaR Evaluate shows them, judged with the oracle."""
    encoder = OracleEncoder(small_oracle())
    references = read_references(concepts, encoder)
    found = [encoder.detect(picture) for picture in pictures]
    compared = [compare_picture(encoder.features(p, f), references) for p, f in zip(pictures, found)]
    owners = [{j: i for i, j in enumerate(c.matches)} for c in compared]
    shown = [tinted(p, f, [o.get(j) for j in range(len(f))]) for p, f, o in zip(pictures, found, owners)]
    return contact_sheet(shown, [c.words(references.names) for c in compared], cell=200)


def write(path: Path, picture: Image.Image) -> None:
    """Write a JPEG of at most ``BYTES`` bytes."""
    for quality in range(90, 20, -5):
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=quality, optimize=True)
        if written.tell() <= BYTES:
            break
    path.write_bytes(written.getvalue())
    print(f"wrote {path.relative_to(REPOSITORY)}")


def main() -> int:
    drawn = cards()
    for path in sorted(WORKFLOWS.glob("*.json")):
        write(path.with_suffix(".jpg"), drawn[path.stem[0]])
    pictures = help_pictures()
    if len(sys.argv) > 1:
        pictures |= model_pictures(Path(sys.argv[1]))
    for node, picture in pictures.items():
        write(HELP / f"{node}.jpg", picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
