"""The metrics against scikit-learn, scipy and plain sorting: pytest tests/test_metrics.py"""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import by_sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import gaussian_filter, label

from evaluate import PixelHistogram, image_metrics, ranking, region_weights

NONE = dict(auroc=None, f1_max=None, ap=None, aupro=None)
Parts = list[tuple[np.ndarray, np.ndarray]]  # maps [B, H, W] and masks, one pair an update


def flat(parts: Parts) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of all pixels: value, truth, 1 / area of the 8-connected region or 0; how many regions there are."""
    values, truths, weights, regions = [], [], [], 0
    for heat, mask in (pair for maps, masks in parts for pair in zip(maps, masks, strict=True)):
        found, n = label(mask, np.ones((3, 3)))
        areas = np.bincount(found.ravel())
        values.append(np.asarray(heat, np.float64).ravel())
        truths.append(mask.ravel())
        weights.append(np.where(mask, 1 / areas[found], 0).ravel())
        regions += n
    return *map(np.concatenate, (values, truths, weights)), regions


def exact_aupro(values: np.ndarray, truth: np.ndarray, weights: np.ndarray, regions: int) -> float:
    order = np.argsort(-values)
    values, truth, weights = values[order], truth[order], weights[order]
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # ties are one step
    fpr = np.append(0, np.cumsum(~truth)[ends] / (~truth).sum())
    pro = np.append(0, np.cumsum(weights)[ends] / regions)
    n = np.searchsorted(fpr, 0.3, side="right")  # the points up to 0.3; the last point of all is at 1
    part = (0.3 - fpr[n - 1]) / (fpr[n] - fpr[n - 1])
    last = pro[n - 1] + part * (pro[n] - pro[n - 1])
    return np.trapezoid(np.append(pro[:n], last), np.append(fpr[:n], 0.3)) / 0.3


def published_pro(values: np.ndarray, truth: np.ndarray, weights: np.ndarray, regions: int) -> float | None:
    low, high = values.min(), values.max()
    points = []
    for i in range(200):
        above = values > low + i * (high - low) / 200
        points.append((above[~truth].sum() / (~truth).sum(), weights[above].sum() / regions))
    fpr, pro = np.array([point for point in points if point[0] < 0.3]).reshape(-1, 2).T
    if len(fpr) < 2 or fpr.min() == fpr.max():
        return None
    return -np.trapezoid(pro, (fpr - fpr.min()) / (fpr.max() - fpr.min()))  # it falls


def by_definition(parts: Parts, pro: str = "exact") -> dict[str, float | None]:
    values, truth, weights, regions = flat(parts)
    found, area = by_sklearn(truth, values), exact_aupro if pro == "exact" else published_pro
    defined = found["auroc"] is not None
    return found | dict(aupro=area(values, truth, weights, regions) if defined else None)


def near(found: dict, want: dict, tolerance: float) -> None:
    assert found == pytest.approx(want, abs=tolerance)
    assert all(value is None or isinstance(value, float) for value in found.values())


def spiral(n: int) -> np.ndarray:
    """One line inwards, that never touches itself."""
    mask = np.ones((1, 1), bool)
    while len(mask) < n:  # an edge along one side, turned
        mask = np.rot90(np.pad(mask, ((2, 0), (0, 0))))
        mask[:, 0] = mask[0, 1] = True
    return mask[:n, :n].copy()


def comb(n: int) -> np.ndarray:
    """Teeth of all lengths, which join only in the last row."""
    mask = np.zeros((n, n), bool)
    for x in range(0, n, 2):
        mask[(x * 7) % (n - 1) :, x] = True
    mask[-1] = True
    return mask


def points(n: int, *places: tuple[slice | int, slice | int]) -> np.ndarray:
    mask = np.zeros((n, n), bool)
    for place in places:
        mask[place] = True
    return mask


EVERY = slice(None)
ZIGZAG = np.arange(13)[:, None] % 4 == np.array([0, 1, 2, 3, 2, 1] * 3)[:13]
MASKS = dict(
    spiral=spiral(13), comb=comb(13), fallen_comb=comb(12).T.copy(), hanging_comb=comb(13)[::-1].copy(),
    zigzag=ZIGZAG, stair=np.eye(13, dtype=bool), cross=np.eye(13, dtype=bool) | np.eye(13, dtype=bool)[::-1],
    chess=np.indices((12, 13)).sum(0) % 2 == 0, dots=points(13, np.s_[::2, ::2]),
    full=np.ones((13, 13), bool), empty=np.zeros((13, 13), bool),
    frame=~np.pad(np.ones((11, 11), bool), 1), pixel=points(13, np.s_[6, 6]),
    corners=points(13, *((y, x) for y in (0, -1) for x in (0, -1))), left=points(13, (EVERY, 0)),
    right=points(13, (EVERY, -1)), sides=points(13, (EVERY, 0), (EVERY, -1)), top=points(13, (0, EVERY)),
    bottom=points(13, (-1, EVERY)), rows=points(13, (slice(None, None, 2), EVERY)),
    right_then_left=points(13, (4, -1), (5, 0), (7, -1), (9, 0)),
    middles=points(13, (0, 6), (-1, 6), (6, 0), (6, -1)),
)  # fmt: skip


def middles(places: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    """The middles of bins."""
    return low + (places + 0.5) * ((high - low) / bins)


RANGES = ((-8.0, 8.0, 2**20), (-8.0, 8.0, 64), (-1.3, 2.1, 1000), (0.0, 1.0, 7), (-3e4, -2e4, 2**16),
          (5.0, 6.0, 1))  # fmt: skip


@st.composite
def rounded(draw) -> tuple[tuple[float, float, int], Parts]:
    """A histogram's range, and updates whose values lie in the middles of its bins."""
    low, high, bins = draw(st.sampled_from(RANGES))
    levels = draw(st.sampled_from([1, 2, 3, 20, 10**6]))  # the fewer, the more ties
    shift = draw(st.sampled_from([-0.5, 0.0, 0.3, 1.0]))  # how well the map finds what is anomalous
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    some = draw(st.permutations(range(bins)) if bins < 8 else st.just(rng.integers(0, bins, 10**4)))
    chosen = np.sort(np.asarray(some)[:levels])
    parts = []
    shapes = st.lists(st.tuples(*[st.integers(1, n) for n in (4, 13, 13)]), min_size=1, max_size=4)
    for b, h, w in draw(shapes):
        masks = []
        for _ in range(b):
            name = draw(st.sampled_from([*MASKS, "noise", "noise", "empty"]))
            mask = np.resize(MASKS[name], (h, w)) if name in MASKS and draw(st.booleans()) else None
            if mask is None:
                mask = MASKS[name][:h, :w] if name in MASKS else rng.random((h, w)) < rng.random()
                mask = np.pad(mask, ((0, h - mask.shape[0]), (0, w - mask.shape[1])))
            masks.append(mask)
        masks = np.stack(masks)
        rank = np.clip((rng.random(masks.shape) + shift * masks) / (1 + abs(shift)), 0, 1 - 1e-9)
        parts.append((middles(chosen[(rank * len(chosen)).astype(int)], low, high, bins), masks))
    return (low, high, bins), parts


def histogram(parts: Parts, low: float = -8, high: float = 8, bins: int = 2**20) -> PixelHistogram:
    found = PixelHistogram(low, high, bins)
    for maps, masks in parts:
        found.update(torch.from_numpy(maps), torch.from_numpy(masks))
    return found


def same(a: PixelHistogram, b: PixelHistogram) -> bool:
    alike = a.counts.dtype == torch.int64 and torch.equal(a.counts, b.counts)
    return alike and all(a.metrics(pro) == b.metrics(pro) for pro in ("exact", "published"))


def summed(*parts: PixelHistogram) -> PixelHistogram:
    """What `all_reduce` makes of the histograms of several ranks."""
    total = copy.deepcopy(parts[0])
    for part in parts[1:]:
        total.counts += part.counts
        total.extremes = torch.maximum(total.extremes, part.extremes)
    return total


def natural(n: int, size: int, deviation: float, seed: int) -> Parts:
    """Smooth raw maps with noise, of a given standard deviation, higher where the masks are true; every other
    image is normal."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.standard_normal((n, size, size)), (0, 6, 6))
    masks = noise > np.quantile(noise, 0.96)
    masks[::2] = False
    maps = gaussian_filter(rng.standard_normal((n, size, size)), (0, 3, 3)) * 10 + masks
    maps += rng.standard_normal(maps.shape) * 0.3
    maps = ((maps - maps.mean()) / maps.std() * deviation + 0.37).astype(np.float32)
    return [(maps[i : i + 4], masks[i : i + 4]) for i in range(0, n, 4)]


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", MASKS)
def test_metrics_are_exact_for_regions_of_every_form(name, levels):
    rng, mask = np.random.default_rng(levels), MASKS[name]
    masks = np.stack([mask, np.zeros_like(mask), mask.T if mask.shape[0] == mask.shape[1] else mask[::-1]])
    places = rng.integers(0, levels, masks.shape) * 10
    places += (masks & (rng.random(masks.shape) < 0.7)) * 5 * levels
    parts = [(middles(2**19 + places, -8, 8, 2**20), masks)]
    near(histogram(parts).metrics(), by_definition(parts), 1e-9)


BLOCKS = np.zeros((40, 40), bool)
BLOCKS[2:32, 2:32] = BLOCKS[37, 37] = True
LARGE = np.pad(np.ones((30, 30)), ((2, 8), (2, 8)))
BRIGHT, DOT = np.zeros((10, 10)), np.zeros((10, 10), bool)
BRIGHT[:2], BRIGHT[5, 5], DOT[5, 5] = 2.0, 1.0, True
FOUR = MASKS["middles"]


@pytest.mark.parametrize(
    ("maps", "masks", "want"),
    [  # falling values: a pixel of a region of two; a normal one; two tied, a region of one and a normal one;
       # two tied, the rest of the region of two and a normal one; nine normal ones; 3 anomalous, 12 normal
       # (rate, overlap): (0, 1/4), (1/12, 1/4), (2/12, 3/4), (3/12, 1), (1, 1)
     ([[9, 5, 0, 0, 0], [7, 0, 0, 0, 0], [8, 5, 0, 7, 0]],
      [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]],
      dict(auroc=(12 + 10.5 + 9.5) / 36, f1_max=6 / 9, ap=(1 + 2 / 4 + 3 / 6) / 3,
           aupro=((0.25 + 0.5 + 0.875) / 12 + 0.3 - 3 / 12) / 0.3)),
     (np.full((4, 5), 0.5), np.eye(4, 5), dict(auroc=0.5, ap=0.2, f1_max=1 / 3, aupro=0.15)),  # all tied
     (FOUR, FOUR, dict.fromkeys(NONE, 1.0)),  # a perfect map, and its opposite
     (-FOUR.astype(float), FOUR, dict(auroc=0.0, ap=4 / 169, f1_max=8 / 173, aupro=0.0)),
     *((heat, BLOCKS, dict(aupro=0.5 + 0.5 * 0.15)) for heat in (LARGE, BLOCKS - LARGE)),  # of any area
     (BRIGHT, DOT, dict(aupro=1 - 20 / 99 / 0.3)),  # the rate is over normal pixels, of good images too
     ([BRIGHT, *np.zeros((3, 10, 10))], [DOT, *np.zeros((3, 10, 10))], dict(aupro=1 - 20 / 399 / 0.3))],
)  # fmt: skip
def test_metrics_worked_out_by_hand(maps, masks, want):
    maps, masks = (np.array(x, float).reshape(-1, *np.shape(x)[-2:]) for x in (maps, masks))
    found = histogram([(maps, masks)], -9.5, 9.5, 19).metrics()
    near({name: found[name] for name in want}, want, 1e-11)


def test_no_metric_leaves_zero_to_one():
    for n in range(2, 200):  # as many normal bins, whose rates do not add up to 0.3 exactly
        masks = np.arange(n + 1)[None, None] == n
        for values in (np.arange(n + 1.0), -np.arange(n + 1.0)):
            found = histogram([(values[None, None], masks)], -200, 200, 400)
            for value in (*found.metrics("exact").values(), *found.metrics("published").values()):
                assert value is None or 0 <= value <= 1, (n, value)


@pytest.mark.parametrize("deviation", [2500 * 2**-16, 1.0])
def test_metrics_of_raw_maps_are_within_a_ten_thousandth_the_published_variant_a_thousandth(deviation):
    parts = natural(20, 200, deviation, 0)
    near(histogram(parts).metrics(), by_definition(parts), 1e-4)
    parts = natural(8, 200, deviation, 5)
    near(histogram(parts).metrics("published"), by_definition(parts, "published"), 1e-3)


@settings(deadline=None, max_examples=100)
@given(rounded(), st.integers(0, 10**6))
def test_metrics_of_rounded_maps_are_scikit_learns_the_exact_aupro_and_the_papers_loop(case, seed):
    (low, high, bins), parts = case
    near(histogram(parts, low, high, bins).metrics(), by_definition(parts), 1e-9)
    # The values spread over d bins, where d shares no factor with 200: no threshold but the first comes
    # nearer to a middle than 1/200 of a bin, so that rounding cannot move one past a value.
    rng = np.random.default_rng(seed)
    span = [d for d in range(1, min(bins, 10**5)) if d % 2 and d % 5] if bins > 1 else [0]
    d = int(rng.choice(span[-1:] + span))
    start = int(rng.integers(0, bins - d))
    low_value, high_value = min(maps.min() for maps, _ in parts), max(maps.max() for maps, _ in parts)
    spread = max(high_value - low_value, 1e-9)
    places = [start + np.rint((maps - low_value) / spread * d) for maps, _ in parts]
    moved = [(middles(x, low, high, bins), masks) for x, (_, masks) in zip(places, parts, strict=True)]
    near(histogram(moved, low, high, bins).metrics("published"), by_definition(moved, "published"), 1e-9)


def test_the_published_variant_worked_out_by_hand_and_on_other_extremes():
    # Thresholds from 0 to 0.995 of 1; normal pixels: 75 at 0, 10 at 0.3, 10 at 0.6, 4 at 0.9025, 1 at 1.
    normal = np.repeat([0.0, 0.3012, 0.6012, 0.9012, 1.0], [75, 10, 10, 4, 1])
    values = np.concatenate([normal, [0.8012, 0.4012, 0.95012, 0.2012]])[None, None]
    masks = np.array([[[*[False] * 100, True, True, True, True]]])  # a region of four
    # (rate, overlap): 0.25 with 1 and 3/4, 0.15 with 3/4 and 1/2, 0.05 with 1/2 and 1/4, 0.01 with 1/4 and 0.
    # What is left of the steps: 0.25 to 0.15 at 3/4, to 0.05 at 1/2, to 0.01 at 1/4.
    want = (0.1 * 0.75 + 0.1 * 0.5 + 0.04 * 0.25) / 0.24
    found = histogram([(values, masks)])
    assert found.metrics("published")["aupro"] == pytest.approx(want, abs=1e-9)
    exact, published = found.metrics(), found.metrics("published")
    assert exact == found.metrics("exact") and exact.pop("aupro") != pytest.approx(want, abs=0.01)
    assert published.pop("aupro") and published == exact  # no other number moves
    parts = natural(8, 40, 0.05, 2)
    far = np.array([[[-7.9, 6.3, 0.4]]]), np.zeros((1, 1, 3), bool)  # two pixels that move all the thresholds
    assert histogram([(np.full((1, 2, 2), 3, np.uint8), far[1][:, :, :2].repeat(2, 1))]).extremes[0] == -3
    scores = [published_pro(*flat(p)) for p in (parts, [*parts, far])]
    assert abs(scores[0] - scores[1]) > 0.01
    for p, want in zip((parts, [*parts, far]), scores, strict=True):
        assert histogram(p).metrics("published")["aupro"] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(
    ("normal", "anomalous", "defined"),
    [(np.repeat([0.0, 0.002, 1.0], [75, 20, 5]), [0.0, 0.001, 0.5, 1.0], True),  # a quarter above the first
     (np.repeat([0.0, 0.3012, 0.6012, 1.0], [70, 10, 15, 5]), [0.0, 0.001, 0.5, 1.0], True),  # 0.3 at first
     ([0.0] * 10, [0.0], False),  # one value: every threshold is it
     ([0.0] * 5 + [1.0] * 5, [0.0], False),  # half of the normal pixels above every threshold: no point
     ([0.0] * 5 + [0.993] * 3 + [1.0] * 2, [0.0], False),  # one point
     ([0.0] * 8 + [1.0] * 2, [0.0], False)],  # 200 points of one rate: no rate to renormalise
)  # fmt: skip
def test_the_published_variant_keeps_its_first_threshold_and_needs_two_points(normal, anomalous, defined):
    heat, mask = np.array([[[*normal, *anomalous]]]), np.arange(len(normal) + len(anomalous)) >= len(normal)
    parts = [(heat, mask[None, None])]
    found, want = histogram(parts), published_pro(*flat(parts))
    near({"aupro": found.metrics("published")["aupro"]}, {"aupro": want}, 1e-9)
    assert (want is not None) == defined and None not in found.metrics("exact").values()
    assert None not in list(found.metrics("published").values())[:3]


@settings(deadline=None, max_examples=50)
@given(rounded(), st.data())
def test_however_the_images_are_shared_out_the_digits_are_the_same(case, data):
    bins, parts = case
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    parts = [(np.clip(maps + rng.normal(0, 0.01), *bins[:2]), masks) for maps, masks in parts]  # raw
    whole = histogram(parts, *bins)
    singles = [(maps[i : i + 1], masks[i : i + 1]) for maps, masks in parts for i in range(len(maps))]
    shares = data.draw(st.integers(1, 3))
    owners = [data.draw(st.integers(0, shares - 1)) for _ in singles]
    order = data.draw(st.permutations(range(len(singles))))
    pieces = [histogram([singles[i] for i in order if owners[i] == n], *bins) for n in range(shares)]
    assert same(summed(*data.draw(st.permutations(pieces))), whole)
    _, truth, _, _ = flat(parts)
    assert whole.counts[:2].sum(1).tolist() == [(~truth).sum(), truth.sum()]


def test_more_than_half_a_million_regions_are_as_good_as_a_few():
    # Copies change none of the metrics: 9,604 regions, doubled until there are ten million.
    rng, masks = np.random.default_rng(0), np.zeros((1, 197, 197), bool)
    masks[0, 1::2, 1::2] = True
    found = histogram([(rng.normal(0, 1, masks.shape).clip(-4, 4) + masks, masks)])
    want = {pro: found.metrics(pro) for pro in ("exact", "published")}
    for _ in range(10):
        found = summed(found, found)
        for pro in want:
            near(found.metrics(pro), want[pro], 1e-9)


def test_memory_does_not_grow_with_the_images():
    found, part, sizes = PixelHistogram(-8, 8, 1000), natural(4, 20, 0.5, 0)[0], set()
    for _ in range(20):
        found.update(*map(torch.from_numpy, part))
        sizes.add(len(pickle.dumps(found)))
    assert len(sizes) == 1 and PixelHistogram(-8, 8).bins == 2**20


def test_what_is_undefined_is_none():
    seen = np.random.default_rng(0).normal(0, 1, (2, 5, 5))
    for parts in ([], [(seen, seen < -9)], [(seen, seen > -9)]):
        assert histogram(parts).metrics() == histogram(parts).metrics("published") == NONE
    masks = np.stack([np.ones((7, 7), bool), np.zeros((7, 7), bool)])  # but together they are defined
    parts = [(middles(np.random.default_rng(0).integers(0, 30, masks.shape) + 9 * masks, 0, 1, 99), masks)]
    found = histogram(parts, 0, 1, 99)
    assert None not in found.metrics().values()
    for pro in ("exact", "published"):
        near(found.metrics(pro), by_definition(parts, pro), 1e-9)
    with pytest.raises(ValueError, match="pro"):
        found.metrics("both")


DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("bins", [1, 3, 1000, 2**20])
@pytest.mark.parametrize("low, high", [(-8.0, 8.0), (-0.1, 0.7), (1 / 3, 2 / 3), (-1e-3, 0.0), (0.0, 1e4)])
def test_a_value_counts_in_the_bin_it_lies_in_and_both_ends_of_the_range_are_in_it(low, high, bins):
    maps, masks = np.array([[[low, high, high, low]]]), np.array([[[False, True, False, False]]])
    found = histogram([(maps, masks)], low, high, bins)
    assert found.counts[0, 0] == (3 if bins == 1 else 2) and found.counts[1, -1] == 1
    near(found.metrics(), by_definition([(maps * (bins > 1), masks)]), 1e-9)
    places = np.random.default_rng(0).integers(0, 2**20, (1, 30, 30))
    for offset in (0.0, 0.01, 0.5, 0.99):
        found = histogram([(-8 + (places + offset) * (16 / 2**20), np.zeros(places.shape, bool))])
        want = np.bincount(places.ravel(), minlength=2**20)
        assert np.array_equal(found.counts[0].numpy(), want) and not found.counts[1:].any()


PLACES = torch.arange(24).view(2, 3, 4)
GOOD = torch.zeros(2, 3, 4), PLACES == 7


@pytest.mark.parametrize(
    "maps, masks",
    [(GOOD[0], GOOD[1][:1]), (GOOD[0][:1], GOOD[1]), (GOOD[0], GOOD[1].mT), (GOOD[0], GOOD[1][:, None]),
     (GOOD[0], GOOD[1][0]), (GOOD[0][0], GOOD[1][0]), (GOOD[0][:, None], GOOD[1][:, None]),
     (GOOD[0].flatten(), GOOD[1].flatten()), (GOOD[0][0, 0, 0], GOOD[1][0, 0, 0]),
     *((GOOD[0].to(dtype).masked_fill(PLACES == place, value), GOOD[1]) for dtype in DTYPES
       for place in (0, 7, 23) for value in (1.02, -1.02, math.nan, math.inf, -math.inf))],
)  # fmt: skip
def test_maps_and_masks_of_other_forms_and_values_are_refused_and_not_counted(maps, masks):
    found = PixelHistogram(-1, 1, 50)
    found.update(*GOOD)
    before = copy.deepcopy(found)
    with pytest.raises(ValueError):
        found.update(maps, masks)
    assert same(found, before)


@pytest.mark.parametrize(
    "form",
    [*(lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.uint8, torch.int64, torch.float16)),
     torch.Tensor.numpy, lambda x: x.mT.contiguous().mT],
)  # fmt: skip
def test_masks_of_zeros_and_ones_arrays_and_strided_tensors_are_taken_and_left_as_they_are(form):
    maps, masks = (torch.from_numpy(x) for x in natural(4, 20, 0.5, 0)[0])
    copies, found = (maps.clone(), masks.clone()), PixelHistogram(-8, 8)
    found.update(maps if isinstance(form(masks), torch.Tensor) else maps.numpy(), form(masks))
    assert same(found, histogram([(maps.numpy(), masks.numpy())]))
    assert torch.equal(maps, copies[0]) and torch.equal(masks, copies[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_of_every_precision_count_as_the_values_they_hold(dtype):
    maps, masks = natural(4, 40, 0.5, 3)[0]
    maps, found = torch.from_numpy(maps).to(dtype), PixelHistogram(-8, 8)
    found.update(maps.requires_grad_(), torch.from_numpy(masks))
    want = [(maps.detach().double().numpy(), masks)]
    assert same(found, histogram(want))
    near(found.metrics(), by_definition(want), 1e-3)
    near(found.metrics("published"), by_definition(want, "published"), 1e-3)


def check_regions(masks: np.ndarray, tensor: torch.Tensor | None = None) -> None:
    want = []
    for found, mask in ((label(mask, np.ones((3, 3)))[0], mask) for mask in masks):
        areas = np.bincount(found.ravel()).tolist()
        want += [round(2**44 / areas[i]) for i in found[mask].tolist()]
    weights = region_weights(torch.from_numpy(masks) if tensor is None else tensor)
    assert weights.dtype == torch.int64 and weights.tolist() == want


DENSITIES = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


@settings(deadline=None, max_examples=150)
@given(arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=12)), DENSITIES, st.integers(0, 10**6))
def test_weights_are_one_over_the_area_of_scipys_regions(masks, density, seed):
    check_regions(masks)
    rng = np.random.default_rng(seed)
    check_regions(rng.random(rng.integers(1, (4, 41, 41))) < density)


NOISE = np.random.default_rng(0).random((400, 500))
LONG = [make(151) for make in (spiral, comb)] + [np.arange(151**2).reshape(151, 151) // 3 % 5 < 2]


@pytest.mark.parametrize(
    "masks",
    [*(np.ascontiguousarray(form)[None].repeat(2, 0) for mask in MASKS.values() for form in
       (mask, ~mask, mask[::-1], mask[:, ::-1], mask.T, mask[1:-1], mask[:, 1:-1], mask[3:4], mask[:, 3:4])),
     *(np.stack([np.rot90(mask, turns), np.rot90(mask, turns + 2)]) for mask in LONG for turns in (0, 3)),
     np.stack([NOISE < 0.4, gaussian_filter(NOISE, 3) > 0.5, NOISE >= 0]),  # of the size of a photograph
     *(np.zeros(shape, bool) for shape in ((1, 1, 1), (3, 5, 7), (0, 5, 7))),
     # images of a batch do not join
     *(np.ones(shape, bool) for shape in ((5, 1, 1), (5, 3, 4), (5, 1, 4), (5, 4, 1))),
     *(np.stack([MASKS[name] for name in names.split()]) for names in
       ("bottom top bottom corners corners full", "sides right left frame empty frame"))],
)  # fmt: skip
def test_weights_are_scipys_for_regions_of_every_form_and_across_a_batch(masks):
    check_regions(masks)


def test_weights_are_in_raster_order_and_masks_need_not_be_contiguous():
    masks = [[1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]], [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    powers = [44, 43, 43, 44, 42, 42, 42, 42]
    assert region_weights(torch.tensor(masks).bool()).tolist() == [2**n for n in powers]
    whole = torch.from_numpy(np.random.default_rng(0).random((6, 20, 30)) < 0.4)
    for view in (whole.mT, whole[::2], whole[:, 1::2], whole[:, :, ::3], whole[:, 2:-2, 2:-2],
                 whole.permute(2, 0, 1), whole[:, :, :1].expand(-1, -1, 7)):  # fmt: skip
        check_regions(view.numpy(), view)


SCORES = st.one_of(st.integers(-2, 2), st.floats(-100, 100, width=32))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 1), SCORES), min_size=1))
def test_image_metrics_are_scikit_learns_and_so_is_a_ranking_of_a_large_datasets_counts(rows):
    labels, scores = map(np.array, zip(*rows, strict=True))
    want = by_sklearn(labels == 1, scores.astype(float))
    near(image_metrics(labels, scores), want, 1e-12)
    values, place = np.unique(-scores, return_inverse=True)
    counts = [10**6 * np.bincount(place[labels == kind], minlength=len(values)) for kind in (1, 0)]
    near(ranking(*counts), want, 1e-9)


def test_image_metrics_of_many_images_and_of_scores_that_hardly_differ_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    for scores in (rng.normal(labels, 1), np.round(rng.normal(labels, 1), 1), labels * 1.0, -labels * 1.0):
        near(image_metrics(labels, scores), by_sklearn(labels == 1, scores), 1e-12)
    labels, scores = np.array([0, 1, 0, 1, 1, 0]), [0.5, 0.5 + 1e-15, 0.5 + 2e-15, 1e300, -1e300, 0.5]
    near(image_metrics(labels, scores), by_sklearn(labels == 1, np.array(scores)), 1e-12)
    near(image_metrics([0, 1], [0.0, -0.0]), dict(auroc=0.5, f1_max=2 / 3, ap=0.5), 1e-12)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda x: np.array(x, np.float32)])
def test_image_metrics_take_lists_arrays_and_tensors_and_are_none_for_one_kind(form):
    labels, scores = [0, 1, 1, 0, 1], [0.25, 0.5, 0.125, 0.5, 1.0]
    assert image_metrics(form(labels), form(scores)) == image_metrics(labels, scores)
    assert image_metrics([bool(x) for x in labels], form(scores)) == image_metrics(labels, scores)
    for labels in ([0], [1, 1], []):
        found = image_metrics(form(labels), form([0.5] * len(labels)))
        assert found == dict(auroc=None, f1_max=None, ap=None)


@pytest.mark.parametrize(
    "labels, scores",
    [([0, 2], [0.1, 0.2]), ([0, -1], [0.1, 0.2]), ([0, 0.5], [0.1, 0.2]), ([0, math.nan], [0.1, 0.2]),
     ([0, 1, 1], [0.1, 0.2]), ([0, 1], [0.1, 0.2, 0.3]), ([0, 1], []), ([], [0.1]), ([0], [0.1, 0.2]),
     ([[0, 1]], [[0.1, 0.2]]), (1, 0.5), ([0, 1], [0.1, math.nan]), ([0, 1], [math.inf, 0.2])],
)  # fmt: skip
def test_bad_labels_and_scores_are_refused(labels, scores):
    with pytest.raises(ValueError):
        image_metrics(labels, scores)
