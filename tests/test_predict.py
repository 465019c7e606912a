"""Any picture in, its score and map out: pytest tests/test_predict.py"""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, as_png, picture, png16, tiff16, write
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from visualad import Prediction, VisualAD, ahead, overlay, resize, to_tensor


@pytest.fixture
def tiny() -> VisualAD:
    return VisualAD.from_pretrained("tiny")


TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees

# --- the same picture in every form


@pytest.mark.parametrize("form", [
    lambda a: Image.fromarray(a),
    lambda a: torch.from_numpy(a).permute(2, 0, 1),
    lambda a: torch.from_numpy(a).permute(2, 0, 1).double() / 255,
    lambda a: a.astype(np.float32) / 255,
    lambda a: a[:, ::-1].copy()[:, ::-1],
    lambda a: np.broadcast_to(a, a.shape),
    lambda a: Image.fromarray(np.dstack([a, np.full(a.shape[:2], 9, np.uint8)])),
    lambda a: as_png(a),
    lambda a: as_png(np.rot90(a), exif=TURNED),
    lambda a: bytearray(as_png(a)),
    lambda a: io.BytesIO(as_png(a)),
    lambda a: SimpleNamespace(file=io.BytesIO(as_png(a)), read=None, filename="a.png"),
], ids="pil tensor double array view readonly alpha bytes exif bytearray BytesIO upload".split())  # fmt: skip
def test_a_picture_gets_one_score_in_whatever_form(tiny, form):
    want, got = tiny.predict(picture()), tiny.predict(form(picture()))
    assert got.score == want.score and np.array_equal(got.map, want.map)
    assert tiny.predict([form(picture()), picture(40, 50)])[0].score == pytest.approx(want.score, abs=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_is_read_as_pil_converts_it_and_grey_as_grey_rgb(mode):
    image = Image.fromarray(picture()).convert(mode)
    assert torch.equal(to_tensor(image), to_tensor(np.array(image.convert("RGB"))))
    grey = np.array(image.convert("L"))
    for form in (grey, grey[..., None], as_png(grey)):
        assert torch.equal(to_tensor(form), to_tensor(np.dstack([grey] * 3)))


def test_sixteen_grey_bits_are_kept_and_what_cannot_be_read_in_full_is_refused(tmp_path):
    grey = (picture()[..., 0].astype(np.uint16) * 200) + np.arange(120, dtype=np.uint16)
    want = to_tensor(grey)
    assert want.unique().numel() > 256 and want.max() == grey.max() / np.float32(65535)
    Image.fromarray(grey).save(tmp_path / "g.tif")
    pgm = b"P5 120 90 65535\n" + grey.astype(">u2").tobytes()
    files = png16(grey), tiff16(grey, 1), pgm, tmp_path / "g.tif"
    for form in (*files, grey / np.float32(65535), grey.astype(">u2"), grey[..., None]):
        assert torch.equal(to_tensor(form), want)
    assert torch.equal(to_tensor(grey // 257 * 257), to_tensor((grey // 257).astype(np.uint8)))
    colour = np.dstack([grey] * 3)
    assert torch.equal(to_tensor(colour), want)
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "f.tif")
    for form in (png16(colour), tiff16(colour, 2), tiff16(grey, 0), tmp_path / "f.tif"):
        with pytest.raises(ValueError, match="Pillow cannot read all of its bits: pass an array"):
            to_tensor(form)
    near = (torch.arange(243).view(3, 9, 9) + 0.03) / 255  # floats between the 256 levels stay as they are
    assert torch.equal(to_tensor(near), near) and to_tensor(near * 0 + 0.2).dtype == torch.uint8
    near[0, 0, 0] = 1 + 5e-7  # rounding
    assert to_tensor(near).max() == 1


@pytest.mark.parametrize("size", [(37, 53), (90, 120), (224, 224), (300, 200)])
def test_resizing_is_pils_within_two_levels(size):
    want = np.array(Image.fromarray(picture()).resize(size[::-1], Image.BICUBIC)).astype(int)
    got = resize(to_tensor(picture()), size).mul(255).round().permute(1, 2, 0).numpy().astype(int)
    off = np.abs(got - want)
    assert off.max() <= 2 and (off > 0).mean() < 0.02
    deep = resize(torch.rand(3, 90, 120), size)
    assert 0 <= deep.min() and deep.max() <= 1


# --- sizes, batches, streams


def test_maps_come_back_at_each_images_own_size_and_in_order(tiny):
    shapes = [(80, 60), (33, 200), (224, 224), (500, 90), (1, 7)]
    images = [picture(*shape, seed) for seed, shape in enumerate(shapes)]
    found = tiny.predict(images, batch_size=2)
    assert [p.map.shape for p in found] == shapes
    for one, image in zip(found, images, strict=True):
        alone = tiny.predict(image)
        assert isinstance(one, Prediction) and one.map.dtype == np.float32 and isinstance(one.score, float)
        assert abs(alone.score - one.score) < 1e-5 and np.abs(alone.map - one.map).max() < 1e-5


@pytest.mark.parametrize("size, shape", [(None, (224, 224)), (80, (80, 80)), ((96, 200), (96, 200))])
def test_the_score_is_taken_at_the_network_size_and_the_map_resized_from_it(tiny, size, shape):
    maps, score = tiny.infer(resize(to_tensor(picture()), shape)[None])
    found = tiny.predict(picture(), size=size)
    assert found.score == score.item()
    want = torch.nn.functional.interpolate(maps[None], (90, 120), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(found.map, want.numpy(), atol=1e-6)
    for wrong in (dict(size=100), dict(size=(96, 100)), dict(size=0), dict(batch_size=0), dict(sigma=-1)):
        with pytest.raises(ValueError, match="near: 96, 104|near: 8, 16|batch_size|sigma"):
            tiny.predict(picture(), **wrong)


def test_folders_lists_and_generators_mix(tiny, tmp_path):
    (tmp_path / ".venv").mkdir()
    for name, seed in (("b.png", 1), ("a.JPG", 2), ("sub/c.webp", 3)):
        write(tmp_path / name, picture(seed=seed))
    for name in (".hidden.png", ".venv/icon.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"no image")
    names = [tmp_path / n for n in ("a.JPG", "b.png", "sub/c.webp")]
    want = [tiny.predict(n).score for n in names]
    with open(names[0], "rb") as opened:
        for images in (tmp_path, str(tmp_path), [opened, *names[1:]], map(str, names)):
            assert [p.score for p in tiny.predict(images)] == pytest.approx(want, abs=1e-5)
    batch = torch.rand(2, 3, 64, 64)
    mixed = tiny.predict(x for x in (tmp_path, picture(), batch, [names[0], Image.fromarray(picture())]))
    assert len(mixed) == 3 + 1 + 2 + 2 and mixed[3].score == pytest.approx(mixed[7].score, abs=1e-5)
    assert len(tiny.predict(batch)) == 2 and tiny.predict([]) == [] and tiny.predict(iter(())) == []
    assert isinstance(tiny.predict(batch[0]), Prediction) and isinstance(tiny.predict([batch[0]]), list)


def test_a_generator_may_reuse_its_buffer_and_close_its_files(tiny):
    pictures, buffer = [picture(seed=i) for i in range(6)], np.empty((90, 120, 3), np.uint8)
    want = [tiny.predict(p).score for p in pictures]

    def closed():
        for p in pictures:
            with Image.open(io.BytesIO(as_png(p))) as file:
                yield file

    reused = (np.copyto(buffer, p) or buffer for p in pictures)
    views = (np.copyto(buffer, p) or torch.from_numpy(buffer).permute(2, 0, 1) for p in pictures)
    for stream in (reused, views, closed()):
        assert [p.score for p in tiny.predict(stream, batch_size=2)] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("batch_size, most", [(1, 0), (2, 6)])
def test_a_stream_is_read_only_a_little_ahead_and_with_batches_of_one_not_at_all(tiny, batch_size, most):
    taken = []
    stream = (taken.append(i) or picture(20, 20, i) for i in range(1000))
    found = tiny.predict_iter(stream, batch_size=batch_size, size=80)
    for answers in range(1, 6):
        next(found)
        assert answers <= len(taken) <= answers + most
    found.close()
    wait = [3, 1, 2, 0] * 3  # which is done first is another matter
    assert list(ahead(lambda n: time.sleep(n / 100) or n, wait, 4)) == wait


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16", "autocast"])
def test_predictions_are_plain_floats_in_any_precision(tiny, cast):
    want = tiny.predict(picture()).score
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        found = getattr(tiny, cast, lambda: tiny)().predict(picture())
    assert found.map.dtype == np.float32 and isinstance(found.score, float)
    assert found.score == pytest.approx(want, abs=0.1)
    assert len(np.unique(found.map)) > 10_000  # smoothed and resized in fp32


def test_what_scores_above_the_threshold_is_anomalous(tiny):
    score = tiny.predict(picture()).score
    for value, verdict in ((score, False), (score - 1e-6, True)):  # above, not at
        tiny.threshold = value
        assert tiny.predict(picture()).anomalous is verdict
    tiny.threshold = None
    assert tiny.predict(picture()).anomalous is None


@pytest.mark.parametrize("quantile, above", [(1.0, 0), (0.9, 1), (0.3, 7), (0.05, 9), (1e-12, 9)])
def test_calibrate_sets_the_quantile_of_normal_scores_and_it_is_saved(tiny, quantile, above, tmp_path):
    normal, options = [picture(seed=i) for i in range(10)], dict(size=(80, 96), sigma=1.0)
    value = tiny.calibrate(normal, quantile, **options)
    assert min(abs(value - p.score - 1e-5) for p in tiny.predict(normal, **options)) < 2e-6
    for batch_size in (1, 3):  # an image calibrated on is not flagged in another batch
        found = tiny.predict(normal, **options, batch_size=batch_size)
        assert sum(p.anomalous for p in found) == above
    tiny.save_pretrained(tmp_path)
    assert VisualAD.from_pretrained(tmp_path).threshold == tiny.threshold == value


def test_the_models_sigma_is_the_default_everywhere_and_is_saved(tmp_path):
    model, x = VisualAD("tiny").eval(), torch.rand(1, 3, 64, 64)
    assert model.sigma == 1.7 and VisualAD(SMALL).sigma == 4.0
    model.sigma = 2.5
    want = model.predict(picture(), sigma=2.5).score
    assert model.predict(picture()).score == want != model.predict(picture(), sigma=4.0).score
    assert torch.equal(model.infer(x)[0], model.infer(x, 2.5)[0])
    assert 0 < model.calibrate([picture()]) - want < 2e-5
    model.save_pretrained(tmp_path)
    assert VisualAD.from_pretrained(tmp_path).predict(picture())[::2] == (want, False)


def test_the_overlay_is_plain_at_low_and_red_at_high():
    pixels, heat = picture(), np.zeros((90, 120), np.float32)
    assert np.array_equal(np.array(overlay(pixels, heat - 5, high=1.0)), pixels)
    heat[10, 20], heat[30, 40] = 1.0, 7.0
    drawn = np.array(overlay(Image.fromarray(pixels), heat, high=1.0))
    assert drawn[10, 20].tolist() == drawn[30, 40].tolist() == [255, 0, 0]
    assert (drawn != pixels).any(axis=2).sum() == 2
    assert np.array_equal(np.array(overlay(pixels, torch.tensor(heat) + 3, low=3.0, high=4.0)), drawn)
    middle = np.array(overlay(np.zeros((1, 1, 3), np.uint8), np.full((1, 1), 0.5), high=1.0))
    assert middle.tolist() == [[[128, 64, 0]]]  # half the way, half yellow, half red
    for wrong, high in ((np.zeros((5, 5)), 1.0), (np.full((90, 120), np.nan), 1.0), (heat, 0.0)):
        with pytest.raises(ValueError, match="map must be finite and of the image's size, and low be below"):
            overlay(pixels, wrong, high=high)


# --- what is no picture


@pytest.mark.parametrize("image, message", [
    (np.zeros((4, 4, 4), np.uint8), r"\[4, 4, 4\]"), (np.zeros((3, 9, 9), np.uint8), r"\[3, 9, 9\]"),
    (np.zeros((2, 9, 9, 3), np.uint8), r"\[2, 9, 9, 3\]"), (np.zeros((0, 9, 3), np.uint8), r"uint8 \[.*0"),
    (np.zeros((9, 9), np.int64), "int64"), (np.array("text"), "<U4"), (np.full((9, 9), np.nan), "nan"),
    (np.full((9, 9), 1.5), "1.5 to 1.5"), (np.full((9, 9), -0.1), "-0.1"), (torch.zeros(9, 9), r"\[9, 9\]"),
    (torch.zeros(3, 9, 9, dtype=torch.int32), "int32"), (torch.full((3, 9, 9), 255.0), "255"),
    (torch.zeros(1, 9, 9), r"\[1, 9, 9\]"), (None, "NoneType"), (Image.new("F", (9, 9)), "bits"),
    (Image.new("I", (9, 9)), "bits"), (b"no picture", "cannot read"), (io.BytesIO(), "cannot read"),
], ids=str)  # fmt: skip
def test_what_is_no_image_is_named(tiny, image, message):
    for images in (image, [picture(), image]):
        with pytest.raises(ValueError, match=message):
            tiny.predict(images)


KINDS = st.sampled_from([np.uint8, np.uint16, np.int8, np.float16, np.float32, np.complex64])


@settings(deadline=None, max_examples=60)
@given(arrays(KINDS, array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5)))
@pytest.mark.filterwarnings("error")  # nothing is repaired with a warning
def test_any_array_is_an_image_or_a_value_error(array):
    try:
        image = to_tensor(array)
    except ValueError as error:
        assert str(error)
    else:
        assert image.shape[0] == 3 and image.shape[1:] == array.shape[:2] and array.ndim in (2, 3)
        assert image.dtype == torch.uint8 or (0 <= image.min() and image.max() <= 1)


def test_unreadable_files_are_named(tiny, tmp_path):
    cut = as_png(picture())[:900]
    for name, content in (("cut.png", cut), ("text.png", b"no picture"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            tiny.predict(tmp_path / name)
    (tmp_path / "folder").mkdir()
    for path, message in (("gone.png", "gone.png"), ("folder", "no image below .*folder")):
        with pytest.raises(FileNotFoundError, match=message):
            tiny.predict(tmp_path / path)


def test_nothing_nonsense_and_scores_that_are_not_finite_make_no_verdict(tiny):
    for images, quantile in (([], 0.9), ([picture()], 0), ([picture()], 1.5), ([picture()], float("nan"))):
        with pytest.raises(ValueError, match="at least one normal image|quantile"):
            tiny.calibrate(images, quantile)
    for broken in (float("nan"), float("inf")):
        tiny.tokens.data[0, 0] = broken
        with pytest.raises(ValueError, match="not finite"):
            tiny.predict([picture(), picture(seed=1)])
