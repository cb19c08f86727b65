"""Image files: every format is decoded to the same upright RGB pixels, or UnusableImage says why not."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from stipple_core.images.crop import fit
from stipple_core.images.images import (
    TRANSPOSE,
    UnusableImage,
    grid,
    image_to_tensor,
    load_image,
    read_size,
    tensor_to_image,
)
from stipple_core.randomness import generator
from tests.helpers.data.image_files import encoded, pixels, png_file, random_image

PICTURES = Path(__file__).parents[2] / "tests" / "pictures"


def test_the_round_trip_to_tensors_is_exact():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3))
    tensor = image_to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert (pixels(tensor_to_image(tensor)) == pixels(image)).all()
    assert tensor[:, 2, 5].tolist() == pytest.approx([value / 127.5 - 1 for value in image.getpixel((5, 2))])


def test_tensors_out_of_range_are_clamped_and_rounded():
    image = tensor_to_image(torch.tensor([-7.0, 9.0, float("nan"), float("inf"), 0.003]).view(1, 1, 5).repeat(3, 1, 1))
    assert [image.getpixel((x, 0))[0] for x in range(5)] == [0, 255, 128, 255, 128]


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_give_the_same_pixels(form):
    image = random_image().quantize(16).convert("RGB")
    options = {"lossless": True} if form == "WEBP" else {}
    assert (pixels(load_image(encoded(image, form, **options))) == pixels(image)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_all_exif_orientations_are_applied(orientation, form):
    upright = random_image()
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    as_stored = upright.transpose(TRANSPOSE[inverse]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    file = encoded(as_stored, form, exif=exif, **options)
    assert read_size(file) == (12, 8)
    loaded = load_image(file)
    assert loaded.size == (12, 8)
    assert (pixels(loaded) == pixels(upright)).all()


def test_orientations_agree_with_pillow():
    from PIL import ImageOps

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = encoded(random_image(), "JPEG", exif=exif, quality=95)
        assert (pixels(load_image(file)) == pixels(ImageOps.exif_transpose(Image.open(file)))).all()


def test_broken_exif_data_are_ignored():
    assert load_image(encoded(random_image(), "PNG", exif=b"Exif\0\0garbage")).size == (12, 8)


def test_alpha_shows_the_background_and_not_the_hidden_color():
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.putpixel((2, 0), (200, 0, 0, 51))
    loaded = load_image(encoded(image), background=(0, 100, 255))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0, 100, 255), (200, 0, 0), (40, 80, 204)]


def test_gray_with_alpha_shows_the_background():
    image = Image.new("LA", (2, 1), (90, 0))
    image.putpixel((1, 0), (90, 255))
    loaded = load_image(encoded(image))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (90, 90, 90)]


def test_transparent_palette_entries_show_the_background():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for options in ({"transparency": 0}, {"transparency": b"\x00\xff"}):
        loaded = load_image(encoded(image, **options))
        assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]


def test_a_transparent_rgb_color_shows_the_background():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    loaded = load_image(encoded(image, transparency=(1, 2, 3)))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (9, 9, 9)]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_scale(form):
    values = np.array([[0, 257, 255, 32768, 65535, 1000]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), form))
    assert loaded.mode == "RGB"
    assert [loaded.getpixel((x, 0))[1] for x in range(6)] == [round(value / 257) for value in values[0].tolist()]


def test_16_bit_gray_with_a_transparent_value_shows_the_background():
    data = struct.pack(">2H", 500, 30000)
    loaded = load_image(png_file(2, 1, 16, 0, data, (b"tRNS", struct.pack(">H", 500))))
    assert [loaded.getpixel((x, 0))[0] for x in range(2)] == [255, round(30000 / 257)]


def test_one_bit_images_are_black_and_white():
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    loaded = load_image(encoded(image))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_cmyk_colors_are_converted():
    for ink, expected in (
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ):
        for form in ("JPEG", "TIFF"):
            loaded = load_image(encoded(Image.new("CMYK", (8, 8), ink), form))
            assert np.abs(pixels(loaded)[4, 4] - expected).max() <= 3


def test_adobe_ycck_colors_are_converted():
    """Pillow writes Adobe's marker with 0; with 2 the values are luma and chroma of the inks, and black."""
    for stored_as, expected in (((120, 128, 128, 255), (135, 135, 135)), ((76, 85, 255, 255), (0, 255, 255))):
        ink = tuple(255 - value for value in stored_as)  # Adobe's values are inverted
        data = bytearray(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100).getvalue())
        marker = data.index(b"Adobe")
        assert data[marker + 11] == 0
        data[marker + 11] = 2
        assert np.abs(pixels(load_image(io.BytesIO(data)))[8, 8] - expected).max() <= 3


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_lab_colors_are_converted(compression):
    for lab, expected in (
        ((255, 128, 128), (255, 255, 255)),
        ((0, 128, 128), (0, 0, 0)),
        ((138, 209, 198), (255, 0, 0)),
    ):
        image = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in lab])
        loaded = load_image(encoded(image, "TIFF", compression=compression))
        assert np.abs(pixels(loaded)[1, 1] - expected).max() <= 12  # another white point


def test_premultiplied_and_padded_colors_are_converted():
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (200, 100, 50, 0))
    loaded = load_image(encoded(image, "TIFF"), background=(0, 100, 200))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(200, 100, 50), (0, 100, 200)]
    assert load_image(encoded(Image.new("RGBX", (2, 1), (9, 8, 7, 0)), "TIFF")).getpixel((0, 0)) == (9, 8, 7)
    ycc = Image.new("RGB", (8, 8), (200, 100, 50)).convert("YCbCr")
    assert np.abs(pixels(load_image(encoded(ycc, "TIFF")))[4, 4] - (200, 100, 50)).max() <= 2


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_an_animation_is_used(form):
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    file = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert load_image(file).getpixel((0, 0)) == (255, 0, 0)


def test_the_first_image_of_a_stereo_photograph_is_used():
    frames = [Image.new("RGB", (16, 16), color) for color in ((255, 0, 0), (0, 0, 255))]
    loaded = load_image(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert np.abs(pixels(loaded)[8, 8] - (255, 0, 0)).max() <= 3


def test_the_format_is_detected_from_the_content(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(random_image()).getvalue())
    assert (pixels(load_image(str(tmp_path / "photo.jpg"))) == pixels(random_image())).all()


def damaged(tmp_path) -> dict[str, Path]:
    """Write one file of each kind of damage; return their paths by kind."""
    noise = encoded(random_image(200, 200)).getvalue()
    contents = {
        "empty": b"",
        "truncated png": noise[: len(noise) // 2],
        "truncated jpeg": encoded(random_image(200, 200), "JPEG").getvalue()[:3000],
        "truncated webp": encoded(random_image(200, 200), "WEBP").getvalue()[:3000],
        "header only": noise[:33],
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "text": b"not an image",
        "float tiff": encoded(Image.new("F", (4, 4), 0.5), "TIFF").getvalue(),
        "bomb": png_file(60000, 60000, 8, 0, b"").getvalue(),
        "large": png_file(8000, 7000, 8, 0, b"").getvalue(),
    }
    for kind, content in contents.items():
        (tmp_path / f"{kind}.png").write_bytes(content)
    (tmp_path / "directory.png").mkdir()
    return {kind: tmp_path / f"{kind}.png" for kind in [*contents, "directory", "missing"]}


def test_damaged_files_are_unusable_with_a_reason(tmp_path):
    for kind, path in damaged(tmp_path).items():
        with pytest.raises(UnusableImage) as caught:
            load_image(str(path))
        assert str(caught.value) and "\n" not in str(caught.value), kind


def test_too_large_images_are_detected_from_the_header(tmp_path):
    with pytest.raises(UnusableImage, match="too many pixels: 8000 x 7000"):
        read_size(str(damaged(tmp_path)["large"]))


def test_random_damage_raises_nothing_but_unusable_image():
    draw = random.Random(0)
    originals = [
        encoded(random_image(40, 40), form).getvalue() for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
    ]
    for _ in range(1500):
        data = bytearray(draw.choice(originals))
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            assert load_image(io.BytesIO(data[: draw.randint(1, len(data))])).mode == "RGB"
        except UnusableImage:
            pass


def test_fit_does_not_change_an_image_of_the_right_size():
    image = load_image(str(PICTURES / "photos" / "lemon.webp"))
    assert torch.equal(fit(image, 128), image_to_tensor(image))


def test_flipping_mirrors_exactly():
    for size in ((128, 128), (90, 70), (64, 200)):
        image = random_image(*size)
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert torch.equal(fit(image, 64, flip=True), fit(image, 64).flip(-1))
        assert (fit(mirrored, 64) - fit(image, 64).flip(-1)).abs().max() <= 2 / 255 + 1e-6


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert fit(Image.fromarray(stripes), 8).abs().max() < 0.1  # gray; without antialiasing, black or white


def test_a_center_crop_removes_the_same_width_at_both_sides():
    bars = np.zeros((32, 96, 3), dtype=np.uint8)
    bars[:, 32:64] = 255
    assert fit(Image.fromarray(bars), 32).min() == 1
    assert fit(Image.fromarray(bars.transpose(1, 0, 2)), 32).min() == 1
    assert fit(Image.fromarray(bars), 16)[..., 2:-2].min() > 0.95


def test_random_crops_depend_only_on_the_generator_and_reach_both_ends():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    first = [fit(ramp, 32, "random", generator=generator(0, "crop", i)).mean().item() for i in range(64)]
    again = [fit(ramp, 32, "random", generator=generator(0, "crop", i)).mean().item() for i in range(64)]
    assert first == again
    assert min(first) < -0.8 and max(first) > 0.8


@pytest.mark.parametrize("size", [(1, 1), (1, 50_000), (50_000, 1), (3, 2)])
def test_extreme_shapes_are_fitted(size):
    image = fit(Image.new("RGB", size, (255, 0, 0)), 64)
    assert image.shape == (3, 64, 64)
    assert torch.equal(image[:, 10, 10], torch.tensor([1.0, -1.0, -1.0]))


def test_grids_place_images_in_rows():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = grid([Image.new("RGB", (10, 10), color) for color in colors], columns=2)
    assert sheet.size == (4 + 2 * 14, 4 + 2 * 14)
    assert [sheet.getpixel(at) for at in ((5, 5), (19, 5), (5, 19), (19, 19))] == [*colors, (255, 255, 255)]


def test_grids_draw_captions_below_images():
    images = [Image.new("RGB", (64, 64), (0, 255, 0))] * 3
    captions = ["a large green square with a very long description " * 9, "", "\N{SNOWMAN} 雪 unbreakable" + "x" * 99]
    sheet = grid(images, 3, captions)
    assert sheet.height > 4 + 64 + 4
    assert (pixels(sheet)[4:68, 4:68] == [0, 255, 0]).all()
    assert (pixels(sheet)[68:, 4:68] < 128).any()


def test_an_empty_grid_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        grid([], 3)


SYSTEM_ERRORS = [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES]


@pytest.mark.parametrize("fault", [*(OSError(number, os.strerror(number)) for number in SYSTEM_ERRORS), MemoryError()])
@pytest.mark.parametrize("place", ["open", "load", "getexif"])
def test_system_errors_are_not_unusable_images(fault, place, monkeypatch):
    def fail(*_, **__):
        raise fault

    file = encoded(random_image())
    monkeypatch.setattr(Image if place == "open" else PngImageFile, place, fail)
    with pytest.raises(OSError) as raised:
        load_image(file)
    assert raised.value.errno == getattr(fault, "errno", errno.ENOMEM)


def test_missing_files_are_unusable_images(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nowhere", "file/x", "loop", "x" * 300, "."):
        with pytest.raises(UnusableImage):
            load_image(str(tmp_path / name))
