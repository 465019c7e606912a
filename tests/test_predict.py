"""Any picture in, its score and map out: pytest tests/test_predict.py"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from visualad import Prediction, VisualAD, overlay, resize, to_tensor


@pytest.fixture(scope="module")
def tiny() -> VisualAD:
    return VisualAD.from_pretrained("tiny")


def picture(h: int = 90, w: int = 120, seed: int = 0) -> np.ndarray:
    """A smooth colour picture with a bright blob, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 140, (6, 8, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)
    pixels = np.array(small)
    pixels[h // 3 : h // 3 + 12, w // 2 : w // 2 + 12] = 250
    return pixels


# --- the same picture in every form


@pytest.mark.parametrize(
    "form",
    [
        lambda a: Image.fromarray(a),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1).float() / 255,
        lambda a: torch.from_numpy(a).permute(2, 0, 1).double() / 255,
        lambda a: a.astype(np.float32) / 255,
        lambda a: a.astype(np.float64) / 255,
        lambda a: a[:, ::-1].copy()[:, ::-1],
        lambda a: np.broadcast_to(a, a.shape),
        lambda a: Image.fromarray(np.dstack([a, np.full(a.shape[:2], 9, np.uint8)])),
    ],
    ids="pil tensor float double array32 array64 view readonly alpha".split(),
)
def test_a_picture_gets_one_score_in_whatever_form(tiny, form, tmp_path):
    pixels = picture()
    want = tiny.predict(pixels)
    got = tiny.predict(form(pixels))
    assert got.score == want.score and np.array_equal(got.map, want.map)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert tiny.predict(path).score == want.score


def test_grey_pictures_are_grey_rgb_pictures(tiny, tmp_path):
    grey = picture()[..., 0]
    want = tiny.predict(np.dstack([grey] * 3)).score
    Image.fromarray(grey).save(tmp_path / "g.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "p.png")
    for form in (grey, Image.fromarray(grey), tmp_path / "g.png", tmp_path / "p.png"):
        assert tiny.predict(form).score == want


def test_sixteen_bits_are_kept(tiny, tmp_path):
    grey = (picture()[..., 0].astype(np.uint16) * 200) + np.arange(120, dtype=np.uint16)
    want = tiny.predict(grey)
    Image.fromarray(grey).save(tmp_path / "g.png")
    (tmp_path / "g.pgm").write_bytes(b"P5 120 90 65535\n" + grey.astype(">u2").tobytes())
    assert Image.open(tmp_path / "g.png").mode.startswith("I;16")
    for form in (tmp_path / "g.png", tmp_path / "g.pgm", grey / np.float32(65535), grey.astype(">u2")):
        assert abs(tiny.predict(form).score - want.score) < 1e-6
    assert to_tensor(grey).unique().numel() > 256 and to_tensor(grey).max() == grey.max() / np.float32(65535)
    assert torch.equal(to_tensor(grey // 257 * 257), to_tensor((grey // 257).astype(np.uint8)))


def test_floats_between_the_256_levels_are_not_rounded():
    near = (torch.arange(243).view(3, 9, 9) + 0.03) / 255  # an 8-bit image it is not
    assert torch.equal(to_tensor(near), near)
    deep = torch.rand(3, 9, 9)
    assert torch.equal(to_tensor(deep), deep)
    assert (
        to_tensor(deep * 0 + 0.5005).dtype == torch.float32 and to_tensor(deep * 0 + 0.2).dtype == torch.uint8
    )


def test_exif_orientation_is_honoured(tiny, tmp_path):
    pixels = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "turned.png", exif=exif)
    got = tiny.predict(tmp_path / "turned.png")
    assert got.map.shape == (90, 120) and got.score == tiny.predict(pixels).score


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_is_read_as_pil_converts_it(mode):
    image = Image.fromarray(picture()).convert(mode)
    assert torch.equal(to_tensor(image), to_tensor(np.array(image.convert("RGB"))))


@pytest.mark.parametrize("size", [(37, 53), (90, 120), (224, 224), (300, 200)])
def test_resizing_is_pils_within_two_levels(size):
    pixels = picture()
    want = np.array(Image.fromarray(pixels).resize(size[::-1], Image.BICUBIC)).astype(int)
    got = resize(to_tensor(pixels), size).mul(255).round().permute(1, 2, 0).numpy().astype(int)
    off = np.abs(got - want)
    assert off.max() <= 2 and (off > 0).mean() < 0.02
    deep = resize(torch.rand(3, 90, 120), size)
    assert 0 <= deep.min() and deep.max() <= 1


# --- sizes, batches, streams


def test_maps_come_back_at_each_images_own_size_and_in_order(tiny):
    images = [
        picture(80, 60, 1),
        picture(33, 200, 2),
        picture(224, 224, 3),
        picture(500, 90, 4),
        picture(1, 7, 5),
    ]
    found = tiny.predict(images, batch_size=2)
    assert [p.map.shape for p in found] == [a.shape[:2] for a in images]
    for one, image in zip(found, images, strict=True):
        alone = tiny.predict(image)
        assert isinstance(one, Prediction) and one.map.dtype == np.float32 and isinstance(one.score, float)
        assert abs(alone.score - one.score) < 1e-5 and np.abs(alone.map - one.map).max() < 1e-5


def test_the_score_is_taken_at_the_network_size_and_the_map_resized_from_it(tiny):
    pixels = picture(320, 320)
    maps, score = tiny.infer(resize(to_tensor(pixels), (224, 224))[None])
    found = tiny.predict(pixels)
    assert found.score == score.item()
    want = torch.nn.functional.interpolate(maps[None], (320, 320), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(found.map, want.numpy(), atol=1e-6)


def test_other_and_non_square_network_sizes(tiny):
    for size in (80, (96, 200), [200, 96]):
        assert tiny.predict(picture(), size=size).map.shape == (90, 120)
    assert tiny.predict(picture(), size=80).score != tiny.predict(picture()).score
    for size, message in (
        (100, "100; near: 96, 104"),
        ((96, 100), "near"),
        ((96,), "size must be"),
        (0, "near: 8, 16"),
        ("56", "size must be"),
        (56.0, "size must be"),
        ((56, None), "size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.predict(picture(), size=size)


def test_folders_lists_and_generators_mix(tiny, tmp_path):
    (tmp_path / "sub").mkdir()
    for name, seed in (("b.png", 1), ("a.JPG", 2), ("sub/c.webp", 3)):
        Image.fromarray(picture(seed=seed)).save(tmp_path / name)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "icon.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("no image")
    names = [tmp_path / n for n in ("a.JPG", "b.png", "sub/c.webp")]
    want = [tiny.predict(n).score for n in names]
    assert [p.score for p in tiny.predict(tmp_path)] == pytest.approx(want, abs=1e-5)
    assert [p.score for p in tiny.predict(names)] == pytest.approx(want, abs=1e-5)
    batch = torch.rand(2, 3, 64, 64)
    mixed = tiny.predict(x for x in (tmp_path, picture(), batch, [names[0], Image.fromarray(picture())]))
    assert len(mixed) == 3 + 1 + 2 + 2 and mixed[3].score == pytest.approx(mixed[7].score, abs=1e-5)
    assert len(tiny.predict(batch)) == 2 and tiny.predict([]) == [] and tiny.predict(iter(())) == []
    assert isinstance(tiny.predict(batch[0]), Prediction) and isinstance(tiny.predict([batch[0]]), list)


def test_a_generator_may_reuse_its_buffer_and_close_its_files(tiny, tmp_path):
    pictures = [picture(seed=i) for i in range(12)]
    want = [tiny.predict(p).score for p in pictures]

    def reused():
        buffer = np.empty_like(pictures[0])
        for p in pictures:
            buffer[:] = p
            yield buffer

    def closed():
        for i, p in enumerate(pictures):
            Image.fromarray(p).save(tmp_path / f"{i}.png")
            with Image.open(tmp_path / f"{i}.png") as file:
                yield file

    for stream in (reused(), (torch.from_numpy(a).permute(2, 0, 1) for a in reused()), closed()):
        assert [p.score for p in tiny.predict(stream, batch_size=4)] == pytest.approx(want, abs=1e-5)
    lazy = Image.open(tmp_path / "0.png")
    assert [p.score for p in tiny.predict([lazy] * 12)] == pytest.approx([want[0]] * 12, abs=1e-5)


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16", "autocast"])
def test_predictions_are_plain_floats_in_any_precision(tiny, cast):
    model, want = VisualAD.from_pretrained("tiny"), tiny.predict(picture()).score
    if cast == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = model.predict(picture())
    else:
        found = getattr(model, cast)().predict(picture())
    assert found.map.dtype == np.float32 and isinstance(found.score, float)
    assert found.score == pytest.approx(want, abs=0.1)
    assert len(np.unique(found.map)) > 10_000  # smoothed and resized in fp32


def test_a_compiled_patch_maps_serves_predict(tiny):
    model, want = VisualAD.from_pretrained("tiny"), tiny.predict(picture())
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph

    model.patch_maps = torch.compile(model.patch_maps, fullgraph=True, backend=backend)
    assert model.predict(picture()).score == pytest.approx(want.score, abs=1e-5) and len(compiled) == 1
    with pytest.raises(ValueError, match="near"):
        model.predict(picture(), size=81)


def test_a_stream_is_read_only_a_little_ahead(tiny):
    taken = []

    def stream():
        for i in range(1000):
            taken.append(i)
            yield picture(20, 20, i)

    found = tiny.predict_iter(stream(), batch_size=2)
    for answers in range(1, 6):
        next(found)
        assert len(taken) <= answers + 3 * 2 + 1
    found.close()


def test_an_empty_name_is_not_the_current_folder(tiny):
    with pytest.raises(ValueError, match="is empty"):
        tiny.predict("")


def test_with_batches_of_one_the_answer_comes_before_the_next_image(tiny):
    log = []

    def stream():
        for i in range(3):
            log.append(f"asked {i}")
            yield picture(20, 20, i)

    for i, _ in enumerate(tiny.predict_iter(stream(), batch_size=1)):
        log.append(f"answered {i}")
    assert log == ["asked 0", "answered 0", "asked 1", "answered 1", "asked 2", "answered 2"]


# --- thresholds and pictures


def test_the_threshold_decides_only_where_it_was_made(tiny):
    model = VisualAD.from_pretrained("tiny")
    model.threshold = None
    assert model.predict(picture()).anomalous is None
    score = model.predict(picture()).score
    model.threshold = dict(value=score, size=[224, 224], sigma=1.7, made="by hand")
    assert model.predict(picture()).anomalous is False  # above, not at
    model.threshold["value"] = score - 1e-6
    assert model.predict(picture()).anomalous is True
    assert model.predict(picture(), size=80).anomalous is None
    assert model.predict(picture(), sigma=2.0).anomalous is None


@pytest.mark.parametrize("quantile, above", [(1.0, 0), (0.9, 1), (0.5, 5), (0.05, 9)])
def test_calibrate_sets_the_quantile_of_normal_scores_and_it_is_saved(quantile, above, tmp_path):
    model = VisualAD.from_pretrained("tiny")
    normal = [picture(seed=i) for i in range(10)]
    value = model.calibrate(normal, quantile)
    assert sum(p.score > value for p in model.predict(normal)) == above
    assert sum(p.anomalous for p in model.predict(normal)) == above
    model.save_pretrained(tmp_path)
    kept = VisualAD.from_pretrained(tmp_path).threshold
    assert (
        kept["value"] == value
        and kept["size"] == [224, 224]
        and kept["sigma"] == 1.7
        and "10" in kept["made"]
    )


def test_calibrate_keeps_the_size_and_sigma_it_was_made_at():
    model = VisualAD.from_pretrained("tiny")
    value = model.calibrate([picture()], size=(80, 96), sigma=1.0)
    assert model.threshold["size"] == [80, 96] and model.threshold["sigma"] == 1.0
    assert 0 < value - model.predict(picture(), size=(80, 96), sigma=1.0).score < 2e-5
    assert model.predict(picture(), size=(80, 96), sigma=1.0).anomalous is False
    assert model.predict(picture()).anomalous is None


def test_the_smallest_quantile_is_the_smallest_score(tiny):
    model, normal = VisualAD.from_pretrained("tiny"), [picture(seed=i) for i in range(4)]
    assert model.calibrate(normal, 1e-12) == min(p.score for p in model.predict(normal)) + 1e-5


def test_the_models_sigma_is_the_default_everywhere_and_is_saved(tmp_path):
    model = VisualAD("tiny").eval()
    assert model.sigma == 4.0
    model.sigma = 2.5
    want = model.predict(picture(), sigma=2.5)
    assert model.predict(picture()).score == want.score != model.predict(picture(), sigma=4.0).score
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.infer(x)[0], model.infer(x, 2.5)[0])
    model.calibrate([picture()])
    assert model.threshold["sigma"] == 2.5 and model.predict(picture()).anomalous is False
    model.save_pretrained(tmp_path)
    assert VisualAD.from_pretrained(tmp_path).predict(picture()).score == want.score


def test_an_image_calibrated_on_is_not_flagged_in_another_batch():
    model, normal = VisualAD.from_pretrained("tiny"), [picture(seed=i) for i in range(9)]
    model.calibrate(normal, quantile=1)
    for size in (1, 2, 9):
        assert not any(p.anomalous for p in model.predict(normal, batch_size=size))
    model.calibrate([normal[0]])
    assert not any(p.anomalous for p in model.predict([normal[0]] * 8))


def test_a_bare_number_is_no_threshold(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "threshold", {"value": 0.5})
    with pytest.raises(ValueError, match="threshold must be None or a dict.*got {'value': 0.5}"):
        tiny.predict(picture())
    monkeypatch.setattr(tiny, "threshold", 0.5)
    with pytest.raises(ValueError, match="threshold must be None or a dict.*got 0.5"):
        tiny.predict(torch.rand(3, 56, 56))
    with pytest.raises(ValueError, match="threshold must be None or a dict.*got 0.5"):
        tiny.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    for wrong in (dict(size=224), dict(size=[224]), dict(value=np.float32(0.5)), dict(sigma="4")):
        made = dict(value=0.5, size=[224, 224], sigma=4.0) | wrong
        monkeypatch.setattr(tiny, "threshold", made)
        with pytest.raises(ValueError, match="threshold must be None or a dict"):
            tiny.predict(picture())


def test_calibrate_refuses_nothing_and_nonsense(tiny):
    with pytest.raises(ValueError, match="at least one"):
        tiny.calibrate([])
    for quantile in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="quantile"):
            tiny.calibrate([picture()], quantile)


def test_the_overlay_is_plain_at_low_and_red_at_high():
    pixels = picture()
    heat = np.zeros((90, 120), np.float32)
    assert np.array_equal(np.array(overlay(pixels, heat, high=1.0)), pixels)
    assert np.array_equal(np.array(overlay(pixels, heat - 5, high=1.0)), pixels)
    heat[10, 20], heat[30, 40] = 1.0, 7.0
    drawn = np.array(overlay(Image.fromarray(pixels), heat, high=1.0))
    middle = np.array(overlay(np.zeros((1, 1, 3), np.uint8), np.full((1, 1), 0.5), high=1.0))
    assert middle.tolist() == [[[128, 64, 0]]]  # half the way, half yellow, half red
    assert drawn[10, 20].tolist() == drawn[30, 40].tolist() == [255, 0, 0]
    changed = (drawn != pixels).any(axis=2)
    assert changed.sum() == 2
    assert np.array_equal(np.array(overlay(pixels, heat + 3, low=3.0, high=4.0)), drawn)


def test_the_overlay_refuses_another_size_or_an_empty_scale():
    with pytest.raises(ValueError, match=r"\[5, 5\] on \[90, 120\]"):
        overlay(picture(), np.zeros((5, 5)), high=1.0)
    mirrored = overlay(picture()[:, ::-1], np.zeros((90, 120), ">f8")[:, ::-1], high=1.0)
    assert np.array_equal(np.array(mirrored), picture()[:, ::-1])
    with pytest.raises(ValueError, match="finite"):
        overlay(picture(), np.full((90, 120), np.nan), high=1.0)
    with pytest.raises(ValueError, match="low"):
        overlay(picture(), np.zeros((90, 120)), high=0.0)


# --- what is no picture


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4, 4), np.uint8), r"\[4, 4, 4\]"),
        (np.zeros((3, 9, 9), np.uint8), r"\[3, 9, 9\]"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"\[2, 9, 9, 3\]"),
        (np.zeros((0, 9, 3), np.uint8), r"empty; got uint8 \[0, 9, 3\]"),
        (np.zeros((9, 9), np.int64), "int64"),
        (np.zeros((9, 9), bool), "bool"),
        (np.array("text"), "<U4"),
        (np.full((9, 9), np.nan), "nan"),
        (np.full((9, 9), 1.5), "1.5 to 1.5"),
        (np.full((9, 9), -0.1), "-0.1"),
        (np.full((9, 9), np.inf), "inf"),
        (torch.zeros(9, 9), r"\[9, 9\]"),
        (torch.zeros(1, 9, 9), r"\[1, 9, 9\]"),
        (torch.zeros(3, 0, 9), r"\[3, 0, 9\]"),
        (torch.zeros(3, 9, 9, dtype=torch.int32), "int32"),
        (torch.full((3, 9, 9), 255.0), "255"),
        (torch.full((3, 9, 9), float("nan")), "nan"),
        (None, "NoneType"),
        (7, "int"),
        (Image.new("F", (9, 9)), "mode F"),
        (Image.new("I", (9, 9)), "mode I"),
    ],
    ids=str,
)
def test_what_is_no_image_is_named(tiny, image, message):
    for images in (image, [picture(), image]):
        with pytest.raises(ValueError, match=message):
            tiny.predict(images)


@settings(deadline=None, max_examples=60)
@given(
    arrays(
        st.sampled_from([np.uint8, np.uint16, np.int8, np.float16, np.float32, np.complex64]),
        array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5),
    )
)
def test_any_array_is_an_image_or_a_value_error(array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is repaired with a warning
        try:
            image = to_tensor(array)
        except ValueError as error:
            assert str(error)
        else:
            assert image.shape[0] == 3 and image.shape[1:] == array.shape[:2] and array.ndim in (2, 3)
            assert image.dtype == torch.uint8 or (0 <= image.min() and image.max() <= 1)


def test_unreadable_files_are_named(tiny, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.png"):
        with pytest.raises(ValueError, match=name):
            tiny.predict(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        tiny.predict(tmp_path / "gone.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="no image below"):
        tiny.predict(tmp_path / "folder")


def test_a_float_tiff_asks_for_an_array(tiny, tmp_path):
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="f.tif.*array"):
        tiny.predict(tmp_path / "f.tif")


def test_bad_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match="batch_size"):
        tiny.predict(picture(), batch_size=0)
    with pytest.raises(ValueError, match="sigma"):
        tiny.predict(picture(), sigma=-1)


def test_scores_that_are_not_finite_are_an_error_not_a_verdict(tiny):
    model = VisualAD.from_pretrained("tiny")
    model.norm.weight.data[0] = 1e38
    for broken in (float("nan"), float("inf")):
        model.tokens.data[0, 0] = broken
        with pytest.raises(ValueError, match="not finite"):
            model.predict([picture(), picture(seed=1)])
