"""The whole line, photos → subjects → composites → training → pictures, on subjects that the project draws itself.

The model is tiny and its weights are random: the demo shows that every stage works and what it hands on, not how well
the method learns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..backbone import load_base
from ..captions import default_prompts
from ..concepts import Background, ClassPicture, Concept
from ..config import FusionConfig, SampleConfig, TrainConfig
from ..dataset import write_dataset
from ..errors import OutputError
from ..fusion import ConceptFusion
from ..photos import list_photos, load_photo, save_pair
from ..recipe import Callbacks, train
from ..report import Page, checkerboard, contact_sheet, dataset_sheet, loss_curves, picture_grid
from ..runs import METRICS_FILE, read_metrics
from ..sampling import draw_pictures
from ..subjects import extract_folder
from .tiny import random_states, tiny_configs, write_folder
from .world import PLACES, describe, empty_scene, near_twin, reference_photos, sample_identity

log = logging.getLogger(__name__)

SIZE = 128
NOTICE = (
    "The model of this demo is tiny and its weights are random: it can't draw. The stages, the losses and the "
    "files are real; pictures worth looking at need Stable Diffusion 2.1 (see the README)."
)
TOKENS = ("<rex-dog>", "<max-dog>")

Progress = Callable[[str, int, int], None]


def run_demo(out: Path, device: str, on_progress: Progress = lambda phase, done, total: None) -> Path:
    """Run all stages below ``out`` and return the page that shows them. Raises OutputError if ``out`` isn't empty."""
    log.warning("%s", NOTICE)
    if out.exists() and any(out.iterdir()):
        raise OutputError(f"{out}: is not empty; delete it or choose another folder (--out)")
    rng = np.random.default_rng(7)
    first = sample_identity(rng, "dog")
    identities = dict(zip(TOKENS, (first, near_twin(first, rng, 2))))
    page = Page("Fuse-and-Refine: two look-alike dogs, from photos to pictures")
    page.section("About this demo", NOTICE)

    concepts = []
    for i, (token, identity) in enumerate(identities.items()):
        folder = out / "photos" / token.strip("<>")
        for k, (image, mask) in enumerate(reference_photos(identity, seed=i, size=2 * SIZE)):
            save_pair(folder / f"{k}.png", image, mask)
        subjects = out / "subjects" / token.strip("<>")
        extract_folder(folder, subjects, progress=lambda done, total: on_progress("extracting", done, total))
        photos = [load_photo(p) for p in list_photos(subjects)]
        concepts.append(Concept(token, "dog", tuple(p.image for p in photos), tuple(p.mask for p in photos)))
        page.section(f"{token}: {describe(identity)}", "Photos, and the subject cut out of each.")
        page.picture(picture_grid([p.image for p in photos], columns=5, cell=200))
        page.picture(contact_sheet([checkerboard(p.image, p.mask) for p in photos], columns=5, cell=200))

    others = [sample_identity(rng, "dog") for _ in range(8)]
    priors = [
        ClassPicture("dog", *reference_photos(identity, seed=10 + i, count=1, size=2 * SIZE)[0])
        for i, identity in enumerate(others)
    ]
    scenes = [Background(empty_scene(name, 3, 2 * SIZE), phrase) for name, (phrase, _) in PLACES.items()]
    page.section("Class pictures", "Other dogs. With a trained model, the base draws these itself.")
    page.picture(picture_grid([p.image for p in priors], columns=8, cell=120))

    fusion = ConceptFusion(concepts, priors, scenes, FusionConfig(size=SIZE, count=48))
    dataset = write_dataset(fusion, out / "dataset", on_progress=lambda *a: on_progress("fusing", *a))
    page.section("Concept Fusion", "Composites with each mention's mask; grey marks a dog that is no concept.")
    page.picture(dataset_sheet([dataset.composite(i) for i in range(16)], dataset.names, columns=4, cell=240))

    configs = tiny_configs(size=SIZE)
    base = load_base(write_folder(out / "tiny-base", configs, random_states(configs)))
    config = TrainConfig(steps=60, sample_every=0, kv_lr=5e-4, embedding_lr=5e-3, refinement_weight=0.1, device=device)
    callbacks = Callbacks(on_phase=on_progress, on_step=lambda step, _: on_progress("training", step, config.steps))
    weights = train(base, dataset, config, out / "run", callbacks=callbacks)
    page.section("Training", "Denoising, prior preservation and Localized Refinement over the steps.")
    page.picture(loss_curves(read_metrics(out / "run" / METRICS_FILE)))

    weights.export_lora(out / "export" / "loras" / "demo.safetensors")
    weights.export_embeddings(out / "export" / "embeddings")
    vocabulary = weights.apply(base)
    prompts = [f"{p}, {PLACES['beach'][0]}" for p in default_prompts(weights.names)]
    pictures = draw_pictures(
        base,
        vocabulary,
        prompts,
        SampleConfig(sampling_steps=10),
        on_progress=lambda *a: on_progress("drawing", *a),
    )
    page.section("Pictures", "Noise, since the model is random.")
    page.picture(picture_grid(pictures, prompts, columns=3, cell=256))
    page.save(out / "index.html")
    return out / "index.html"
