"""Segment-anything's files: read without unpickling, recognised by their shapes, and others refused."""

from __future__ import annotations

import pytest
import torch

from far_train.data.sam import build_sam, load_sam, sam_spec
from far_train.data.subjects import Prompt, SubjectExtractor
from far_train.utils.errors import SubjectError

from .tiny_sam import TINY, save_tiny, tiny_sam


def test_a_small_sam_loads_from_its_file_alone(tmp_path):
    sam = tiny_sam()
    loaded = load_sam(save_tiny(tmp_path / "sam.safetensors", sam))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    image = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(1))
    box, points = (5, 6, 50, 30), ((20, 10, 1), (3, 35, 0))
    for prompt in (Prompt(), Prompt(box), Prompt(points=points), Prompt(box, points)):
        (masks, scores), (loaded_masks, loaded_scores) = (
            SubjectExtractor(s).predict(image, prompt) for s in (sam, loaded)
        )
        assert torch.equal(masks, loaded_masks) and torch.equal(scores, loaded_scores)


def test_pth_and_half_precision_files_load(tmp_path):
    loaded = load_sam(save_tiny(tmp_path / "sam.pth", tiny_sam().half()))
    assert loaded.mask_decoder.transformer.layers[0].self_attn.num_heads == 8  # what a .pth can't say
    expected = tiny_sam().half().float().state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_published_models_are_recognised_by_their_shapes(name):
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        published = sam_model_registry[name]()
        rebuilt = build_sam(sam_spec(published.state_dict()))
    assert {k: v.shape for k, v in published.state_dict().items()} == {
        k: v.shape for k, v in rebuilt.state_dict().items()
    }
    assert repr(published) == repr(rebuilt)
    assert published.image_encoder.img_size == rebuilt.image_encoder.img_size
    for a, b in zip(published.modules(), rebuilt.modules(), strict=True):
        for attribute in ("num_heads", "window_size", "scale", "input_image_size", "num_multimask_outputs", "eps"):
            assert getattr(a, attribute, None) == getattr(b, attribute, None)
    assert torch.equal(published.pixel_mean, rebuilt.pixel_mean) and torch.equal(published.pixel_std, rebuilt.pixel_std)


class Evil:
    def __reduce__(self):
        return exec, ("import far_train; far_train.was_unpickled = True",)


def test_files_that_are_no_sam_are_refused_and_never_run(tmp_path):
    import far_train

    torch.save({"unet.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "empty.pth").touch()
    cases = {
        "other.pth": "is not a segment-anything file: it lacks 'image_encoder.*unet.weight",
        "list.pth": "no plain state dict",
        "evil.pth": "can't be read as weights",
        "junk.pth": "can't be read",
        "junk.safetensors": "can't be read",
        "empty.pth": "can't be read",
        "none.pth": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(SubjectError, match=f"(?s){name}: .*{message}"):
            load_sam(tmp_path / name)
    assert not hasattr(far_train, "was_unpickled")


def test_variants_of_sam_are_refused_with_the_tensors_names(tmp_path):
    state = tiny_sam().state_dict()
    state["mask_decoder.hf_token.weight"] = torch.zeros(1, 32)
    del state["mask_decoder.iou_token.weight"]
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(9, 32)
    torch.save(state, tmp_path / "hq.pth")
    with pytest.raises(SubjectError, match=r"hq\.pth: .*3 tensors.*hf_token.*iou_token.*mask_tokens"):
        load_sam(tmp_path / "hq.pth")


@pytest.mark.parametrize(
    "stated", ["not json", "[1]", '{"decoder_heads": 3}', '{"decoder_heads": "4"}', '{"colour": 1}']
)
def test_wrong_metadata_is_refused(tmp_path, stated):
    with pytest.raises(SubjectError, match=r"sam\.safetensors"):
        load_sam(save_tiny(tmp_path / "sam.safetensors", tiny_sam(), stated))


def test_an_incomplete_spec_is_refused():
    with pytest.raises(SubjectError, match="lacks depth, window_size"):
        build_sam({k: v for k, v in TINY.items() if k not in ("depth", "window_size")})
    with pytest.raises(SubjectError, match="embed_dim 24 is not a multiple of 5"):
        build_sam({**TINY, "num_heads": 5})
