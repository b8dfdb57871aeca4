"""A small training set of two cats, for tests of dataset folders."""

from __future__ import annotations

import torch

from far_train.data.concepts import ClassPicture, Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig

SIZE = 64


def fuse_cats() -> ConceptFusion:
    """Six composites of two cats, among them every layout in use, and two class pictures."""
    image, mask = torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 50)
    mask[5:35, 10:40] = 1
    concepts = [Concept(token, "cat", (image,), (mask,)) for token in ("<tom>", "<felix>")]
    priors = [ClassPicture("cat", image.flip(0), mask.flip(0)), ClassPicture("cat", image.flip(1))]
    config = FusionConfig(size=SIZE, count=6, layout_weights={"original": 1, "pair": 2, "beside_prior": 2})
    return ConceptFusion(concepts, priors, (), config)
