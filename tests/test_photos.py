"""Photos: the right upright pixels, or an error that names the file; writes are whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from far_train.data import images
from far_train.data.folders import list_photos
from far_train.data.images import load_mask, load_photo, save_mask, save_pair, save_picture
from far_train.utils.errors import OutputError, PhotoError

HEIGHT, WIDTH = 20, 36
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "two_dogs"
SAVE = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}


def gradient(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture that no flip or rotation maps to itself, smooth enough for JPEG."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 / (height - 1), x * 255 / (width - 1), np.full_like(y, 90)], -1).round().astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def difference(photo: images.Photo, expected: np.ndarray) -> float:
    assert photo.image.shape == expected.shape and photo.image.dtype == torch.float32
    return float((photo.image * 255 - torch.tensor(expected).float()).abs().max())


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores so that the EXIF orientation gives ``upright`` (EXIF 2.3, tag 0x0112)."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright).copy()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims this size, whatever pixels it has."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(as_stored(gradient(), orientation)).save(path, exif=exif(orientation), **SAVE.get(suffix, {}))
    photo = load_photo(path)
    assert difference(photo, gradient()) <= (4 if suffix == "jpg" else 0)
    assert photo.full_size == (HEIGHT, WIDTH)


def test_mask_fits_the_upright_photo_and_not_the_stored_one(tmp_path):
    Image.fromarray(as_stored(gradient(), 6)).save(tmp_path / "a.jpg", exif=exif(6))
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "a.mask.png")
    assert load_photo(tmp_path / "a.jpg").mask.shape == (HEIGHT, WIDTH)
    Image.new("L", (HEIGHT, WIDTH), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(PhotoError) as e:
        load_photo(tmp_path / "a.jpg")
    for part in ("a.jpg", "a.mask.png", f"{HEIGHT}x{WIDTH}", f"{WIDTH}x{HEIGHT}"):
        assert part in str(e.value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_photo(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert difference(load_photo(tmp_path / "a.png"), gradient()) == 0


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / f"a.{suffix}", **SAVE.get(suffix, {}))
    assert difference(load_photo(tmp_path / f"a.{suffix}"), gradient()) <= 6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    image = load_photo(tmp_path / f"a.{suffix}").image
    assert (image - torch.from_numpy(ramp / 65535)[..., None]).abs().max() <= 0.5 / 255 + 1e-6


def test_16_bit_values_in_a_32_bit_tiff(tmp_path):
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.int32)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    image = load_photo(tmp_path / "a.tif").image
    assert (image - torch.from_numpy(ramp / 65535)[..., None]).abs().max() <= 0.5 / 255 + 1e-6


def test_12_bit_grey_tiff(tmp_path):
    values = np.linspace(0, 4095, 16 * 16).astype(int)
    packed = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.reshape(-1, 2).tolist())
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 16, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(header.ljust(122, b"\0") + packed)
    image = load_photo(tmp_path / "a.tif").image[..., 0].flatten()
    assert (image - torch.from_numpy(values / 4095)).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    "values",
    [
        np.full((HEIGHT, WIDTH), 0.5, np.float32),
        np.full((HEIGHT, WIDTH), 1_000_000, np.int32),
        np.full((HEIGHT, WIDTH), 200, np.int32),
        np.full((HEIGHT, WIDTH), -5, np.int32),
    ],
)
def test_pixels_without_a_known_white_level_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(PhotoError, match=r"a\.tif.*white level"):
        load_photo(tmp_path / "a.tif")


def test_grey_and_bilevel(tmp_path):
    grey = gradient()[..., 1]
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert difference(load_photo(tmp_path / "a.png"), np.stack([grey] * 3, -1)) == 0
    Image.fromarray(grey > 127).save(tmp_path / "b.png")
    assert difference(load_photo(tmp_path / "b.png"), np.stack([(grey > 127) * np.uint8(255)] * 3, -1)) == 0


def test_palette_with_and_without_transparency(tmp_path):
    index = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3
    colours = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], np.uint8)
    picture = Image.fromarray(index.astype(np.uint8), "P")
    picture.putpalette(colours.tobytes())
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", transparency=1)
    plain, cut = load_photo(tmp_path / "a.png"), load_photo(tmp_path / "b.png")
    assert difference(plain, colours[index]) == 0 and plain.mask is None
    assert difference(cut, colours[index]) == 0
    assert torch.equal(cut.mask, torch.from_numpy(index != 1).float())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_the_mask_and_colours_stay_straight(tmp_path, mode):
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    straight = Image.fromarray(gradient()).convert(mode[:-1])
    picture = straight.copy()
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert difference(photo, np.asarray(straight.convert("RGB"))) == 0
    assert torch.equal((photo.mask * 255).round().to(torch.uint8), torch.from_numpy(alpha))


def test_opaque_alpha_is_no_mask_and_a_mask_file_wins(tmp_path):
    picture = Image.fromarray(gradient()).convert("RGBA")
    picture.save(tmp_path / "a.png")
    assert load_photo(tmp_path / "a.png").mask is None
    picture.putalpha(Image.new("L", picture.size, 10))
    picture.save(tmp_path / "a.png")
    Image.new("L", picture.size, 200).save(tmp_path / "a.mask.png")
    assert torch.allclose(load_photo(tmp_path / "a.png").mask, torch.tensor(200 / 255))


def test_transparent_parts_of_a_mask_picture_are_background(tmp_path):
    picture = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
    picture.paste((255, 255, 255, 255), (0, 0, 10, HEIGHT))
    picture.save(tmp_path / "a.png")
    assert load_mask(tmp_path / "a.png").sum(0).tolist() == [HEIGHT] * 10 + [0] * (WIDTH - 10)


@pytest.mark.parametrize("others_allow_truncated", [False, True])
@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        ("png", {}),
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("webp", {"lossless": True}),
        ("webp", {}),
        ("bmp", {}),
        ("tif", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("tif", {"compression": "jpeg"}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_files_are_refused_whatever_others_set(tmp_path, monkeypatch, suffix, how, others_allow_truncated):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", others_allow_truncated)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(200, 300)).save(path, **how)
    whole = path.read_bytes()
    assert load_photo(path).image.shape == (200, 300, 3)
    for share in (0.0, 0.01, 0.4, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(PhotoError, match=rf"a\.{suffix}.*again"):
            load_photo(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is others_allow_truncated


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_give_a_named_error_or_a_picture(tmp_path):
    rng = random.Random(0)
    refused = 0
    for suffix in ("png", "jpg", "webp", "bmp", "tif"):
        buffer = io.BytesIO()
        Image.fromarray(gradient()).save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        for _ in range(60):
            damaged = bytearray(buffer.getvalue())
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(min(len(damaged), 200))] = rng.randrange(256)
            path = tmp_path / f"x.{suffix}"
            path.write_bytes(damaged)
            try:
                load_photo(path)
            except PhotoError as e:
                assert path.name in str(e)
                refused += 1
    assert refused > 50


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit_of_others", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("size", [(60_000, 60_000), (17_850, 10_000)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch, size, limit_of_others):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit_of_others)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded before the check"))
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(PhotoError, match=r"bomb\.png.*megapixels"):
        load_photo(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS == limit_of_others


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_tiny_pictures_are_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=rf"a\.png.*{size[0]}x{size[1]}.*16"):
        load_photo(tmp_path / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert load_photo(tmp_path / "a.png").image.shape == (16, 16, 3)


def test_other_formats_are_not_handed_to_their_decoders(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(a))
    Image.fromarray(gradient()).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(PhotoError, match=r"a\.jpg: is not a PNG"):
        load_photo(tmp_path / "a.jpg")
    assert not called


def test_missing_file_and_folder_as_photo(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(PhotoError, match=path.name):
            load_photo(path)


def test_max_side_scales_picture_and_mask_together(tmp_path):
    Image.new("RGB", (400, 200), (40, 80, 120)).save(tmp_path / "a.png")
    mask = np.zeros((200, 400), np.uint8)
    mask[:, :101] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    photo = load_photo(tmp_path / "a.png", max_side=100)
    assert photo.image.shape == (50, 100, 3) and photo.mask.shape == (50, 100)
    assert photo.full_size == (200, 400)
    # The area filter keeps the covered share of the cut column: a quarter.
    assert (photo.mask[7, 24:27] * 255).round().tolist() == [255, 64, 0]
    assert load_photo(tmp_path / "a.png", max_side=400).image.shape == (200, 400, 3)


def test_list_photos_sorts_naturally_and_skips_what_is_no_photo(tmp_path):
    for name in ("10.jpg", "2.JPG", "1.png", "1.mask.png", ".hidden.png", "notes.txt", "a2b.tiff", "a.webp", "B.bmp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_photos(tmp_path)] == ["1.png", "2.JPG", "10.jpg", "a.webp", "a2b.tiff", "B.bmp"]


def test_list_photos_names_the_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, fix in (("none", "no such folder"), ("file", "is a file"), ("empty", "put pictures")):
        with pytest.raises(PhotoError, match=rf"{name}: .*{fix}"):
            list_photos(tmp_path / name)


def test_saved_pictures_and_masks_read_back(tmp_path):
    image = torch.from_numpy(noise(HEIGHT, WIDTH)).float() / 255
    mask = torch.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    save_pair(tmp_path / "new" / "a.png", image, mask)
    photo = load_photo(tmp_path / "new" / "a.png")
    assert torch.equal(photo.image, image)
    assert (photo.mask - mask).abs().max() <= 0.5 / 255 + 1e-6
    save_mask(tmp_path / "m.png", mask * 3 - 1)
    assert load_mask(tmp_path / "m.png").min() == 0 and load_mask(tmp_path / "m.png").max() == 1
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["a.mask.png", "a.png", "m.png"]


def fail_on_call(monkeypatch, owner, name: str, number: int, error: OSError) -> None:
    """Let ``owner.name`` fail on its n-th call, after whatever it did to its file."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            if name == "save":
                args[1].write(b"half a pict")
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["save", "replace"])
def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch, step):
    path = tmp_path / "a.png"
    save_picture(path, torch.zeros(16, 16, 3))
    before = path.read_bytes()
    fail_on_call(monkeypatch, Image.Image if step == "save" else os, step, 1, FULL)
    with pytest.raises(OutputError, match=r"a\.png.*No space left.*free space"):
        save_picture(path, torch.ones(16, 16, 3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("old_pair", [False, True])
@pytest.mark.parametrize(("step", "number"), [("save", 1), ("save", 2), ("replace", 1), ("replace", 2)])
def test_a_failed_pair_never_mixes_old_and_new(tmp_path, monkeypatch, step, number, old_pair):
    path = tmp_path / "a.png"
    if old_pair:
        save_pair(path, torch.zeros(16, 16, 3), torch.zeros(16, 16))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fail_on_call(monkeypatch, Image.Image if step == "save" else os, step, number, FULL)
    with pytest.raises(OutputError, match="No space left"):
        save_pair(path, torch.ones(16, 16, 3), torch.ones(16, 16))
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after == (before if step == "save" else {})


def test_interruption_leaves_no_temporary(tmp_path, monkeypatch):
    fail_on_call(monkeypatch, Image.Image, "save", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_pair(tmp_path / "a.png", torch.ones(16, 16, 3), torch.ones(16, 16))
    assert not list(tmp_path.iterdir())


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "taken.png"):
        with pytest.raises(OutputError, match=rf"{path.name}: can't be written"):
            save_mask(path, torch.ones(16, 16))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.png"]


def test_real_photos():
    if not DATA.is_dir():
        pytest.skip(f"the photos of {DATA} are not here")
    for folder, count in (("corgi", 5), ("chow", 5), ("class_prior", 12)):
        paths = list_photos(DATA / folder)
        assert [p.stem for p in paths] == [f"{i:02d}" for i in range(count)]
        photo = load_photo(paths[0], max_side=256)
        assert max(photo.image.shape) == 256 and photo.image.std() > 0.05
        assert photo.mask.shape == photo.image.shape[:2] and 0.02 < photo.mask.mean() < 0.95
