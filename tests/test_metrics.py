"""The metrics against scikit-learn, scipy and plain sorting: pytest tests/test_metrics.py"""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import gaussian_filter, label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from evaluate import PixelHistogram, image_metrics, ranking, region_weights

NONE = dict(auroc=None, f1_max=None, ap=None, aupro=None)
Parts = list[tuple[np.ndarray, np.ndarray]]  # maps [B, H, W] and masks, one pair an update


# --- the same numbers, from definitions


def regions_of(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The 8-connected region of each pixel of a mask, from 1, and how many there are."""
    return label(mask, np.ones((3, 3)))


def flat(parts: Parts) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of all pixels: value, truth, and 1 / area of its region, 0 where there is none; and the regions."""
    values, truths, weights, regions = [], [], [], 0
    for maps, masks in parts:
        for heat, mask in zip(maps, masks, strict=True):
            found, n = regions_of(mask)
            areas = np.bincount(found.ravel())
            values.append(np.asarray(heat, np.float64).ravel())
            truths.append(mask.ravel())
            weights.append(np.where(mask, 1 / areas[found], 0).ravel())
            regions += n
    return *map(np.concatenate, (values, truths, weights)), regions


def exact_aupro(values: np.ndarray, truth: np.ndarray, weights: np.ndarray, regions: int) -> float | None:
    if truth.all() or not truth.any():
        return None
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
    if truth.all() or not truth.any():
        return None
    low, high = values.min(), values.max()
    points = []
    for i in range(200):
        above = values > low + i * (high - low) / 200
        points.append((above[~truth].sum() / (~truth).sum(), weights[above].sum() / regions))
    fpr, pro = np.array([point for point in points if point[0] < 0.3]).reshape(-1, 2).T
    if len(fpr) < 2 or fpr.min() == fpr.max():
        return None
    return -np.trapezoid(pro, (fpr - fpr.min()) / (fpr.max() - fpr.min()))  # it falls


def by_sklearn(truth: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
    if truth.all() or not truth.any():
        return dict(auroc=None, f1_max=None, ap=None)
    precision, recall, _ = precision_recall_curve(truth, values)
    f1 = np.nan_to_num(2 * precision * recall / np.maximum(precision + recall, 1e-300))
    ap = average_precision_score(truth, values)
    return dict(auroc=roc_auc_score(truth, values), f1_max=f1.max(), ap=ap)


def by_definition(parts: Parts, pro: str = "exact") -> dict[str, float | None]:
    values, truth, weights, regions = flat(parts)
    area = (exact_aupro if pro == "exact" else published_pro)(values, truth, weights, regions)
    return by_sklearn(truth, values) | dict(aupro=area)


def near(found: dict, want: dict, tolerance: float) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        if value is None or found[name] is None:
            assert found[name] is None and value is None, (name, found, want)
        else:
            assert isinstance(found[name], float), (name, found)
            assert abs(found[name] - value) <= tolerance, (name, found, want)


# --- masks and maps


def spiral(n: int) -> np.ndarray:
    """One line from a corner inwards, that never touches itself."""
    mask = np.zeros((n, n), bool)
    y, x, dy, dx = 0, 0, 0, 1
    mask[0, 0] = True
    for _ in range(n * n):
        two = y + 2 * dy, x + 2 * dx
        blocked = 0 <= two[0] < n and 0 <= two[1] < n and mask[two]
        if blocked or not (0 <= y + dy < n and 0 <= x + dx < n):
            dy, dx = dx, -dy
            if mask[y + 2 * dy if 0 <= y + 2 * dy < n else y, x + 2 * dx if 0 <= x + 2 * dx < n else x]:
                break
        y, x = y + dy, x + dx
        mask[y, x] = True
    return mask


def comb(n: int) -> np.ndarray:
    """Teeth of all lengths, which join only in the last row."""
    mask = np.zeros((n, n), bool)
    for x in range(0, n, 2):
        mask[(x * 7) % (n - 1) :, x] = True
    mask[-1] = True
    return mask


def nested(n: int) -> np.ndarray:
    """Us within Us, whose arms join in the last rows."""
    mask = np.zeros((n, n), bool)
    for i in range(0, n // 2, 2):
        mask[: n - i, i] = mask[: n - i, n - 1 - i] = mask[n - 1 - i, i : n - i] = True
    return mask


def points(n: int, *places: tuple[slice | int, slice | int]) -> np.ndarray:
    mask = np.zeros((n, n), bool)
    for place in places:
        mask[place] = True
    return mask


EVERY = slice(None)
ZIGZAG = np.arange(13)[:, None] % 4 == np.array([0, 1, 2, 3, 2, 1] * 3)[:13]
MASKS = dict(
    spiral=spiral(13), turned_spiral=np.rot90(spiral(12), 2).copy(), comb=comb(13),
    fallen_comb=comb(12).T.copy(), hanging_comb=comb(13)[::-1].copy(), nested=nested(13),
    roofs=nested(12)[::-1].copy(), zigzag=ZIGZAG, stair=np.eye(13, dtype=bool),
    other_stair=np.eye(13, dtype=bool)[::-1].copy(),
    cross=np.eye(13, dtype=bool) | np.eye(13, dtype=bool)[::-1], chess=np.indices((13, 13)).sum(0) % 2 == 0,
    other_chess=np.indices((12, 13)).sum(0) % 2 == 1, dots=points(13, np.s_[::2, ::2]),
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


RANGES = (
    (-8.0, 8.0, 2**20),
    (-8.0, 8.0, 64),
    (-1.3, 2.1, 1000),
    (0.0, 1.0, 7),
    (-3e4, -2e4, 2**16),
    (5.0, 6.0, 1),
)


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
    for b, h, w in draw(
        st.lists(st.tuples(*[st.integers(1, n) for n in (4, 13, 13)]), min_size=1, max_size=4)
    ):
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
    alike = a.counts.dtype == b.counts.dtype == torch.int64 and torch.equal(a.counts, b.counts)
    alike = alike and torch.equal(a.regions, b.regions) and torch.equal(a.extremes, b.extremes)
    return alike and all(a.metrics(pro) == b.metrics(pro) for pro in ("exact", "published"))


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


# --- the exact metrics


@settings(deadline=None, max_examples=120)
@given(rounded())
def test_metrics_of_rounded_maps_are_scikit_learns_and_the_exact_aupro(case):
    bins, parts = case
    near(histogram(parts, *bins).metrics(), by_definition(parts), 1e-9)


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", MASKS)
def test_metrics_are_exact_for_regions_of_every_form(name, levels):
    rng, mask = np.random.default_rng(levels), MASKS[name]
    masks = np.stack([mask, np.zeros_like(mask), mask.T if mask.shape[0] == mask.shape[1] else mask[::-1]])
    places = (
        rng.integers(0, levels, masks.shape) * 10 + (masks & (rng.random(masks.shape) < 0.7)) * 5 * levels
    )
    parts = [(middles(2**19 + places, -8, 8, 2**20), masks)]
    near(histogram(parts).metrics(), by_definition(parts), 1e-9)


def test_the_metrics_of_a_map_worked_out_by_hand():
    # Falling values: a pixel of a region of two; a normal one; two tied, a region of one and a normal one;
    # two tied, the rest of the region of two and a normal one; nine normal ones. 3 anomalous, 12 normal.
    maps = torch.tensor([[9, 5, 0, 0, 0], [7, 0, 0, 0, 0], [8, 5, 0, 7, 0]]).double()
    masks = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
    found = PixelHistogram(-0.5, 9.5, 10)
    found.update(maps[None], masks[None])
    # (rate, overlap): (0, 1/4), (1/12, 1/4), (2/12, 3/4), (3/12, 1), (1, 1)
    aupro = ((0.25 + 0.5 + 0.875) / 12 + 0.3 - 3 / 12) / 0.3
    want = dict(auroc=(12 + 10.5 + 9.5) / 36, f1_max=6 / 9, ap=(1 + 2 / 4 + 3 / 6) / 3, aupro=aupro)
    near(found.metrics(), want, 1e-12)
    one = PixelHistogram(0, 1, 1)  # all tied
    one.update(torch.full((1, 4, 5), 0.5), torch.eye(4, 5, dtype=torch.bool)[None])
    near(one.metrics(), dict(auroc=0.5, ap=0.2, f1_max=1 / 3, aupro=0.15), 1e-12)


def test_a_perfect_map_scores_one_and_its_opposite_as_low_as_can_be():
    masks = torch.from_numpy(MASKS["middles"])[None]
    for sign in (1, -1):
        found = PixelHistogram(-8, 8)
        found.update(sign * masks.double(), masks)
        want = dict.fromkeys(NONE, 1.0)
        if sign < 0:
            want = dict(auroc=0.0, ap=4 / 169, f1_max=8 / 173, aupro=0.0)
        near(found.metrics(), want, 1e-12)


def test_no_metric_leaves_zero_to_one():
    for n in range(2, 200):  # as many normal bins, whose rates do not add up to 0.3 exactly
        masks = np.arange(n + 1)[None, None] == n
        for values in (np.arange(n + 1.0), -np.arange(n + 1.0)):
            found = histogram([(values[None, None], masks)], -200, 200, 400)
            for value in (*found.metrics("exact").values(), *found.metrics("published").values()):
                assert value is None or 0 <= value <= 1, (n, value)


def test_every_region_weighs_the_same_whatever_its_area():
    masks = np.zeros((1, 40, 40), bool)
    masks[0, 2:32, 2:32] = masks[0, 37, 37] = True
    for found in ("large", "small"):
        heat = np.zeros((1, 40, 40))
        heat[0, 2:32, 2:32] = found == "large"
        heat[0, 37, 37] = found == "small"
        near({"aupro": histogram([(heat, masks)]).metrics()["aupro"]}, {"aupro": 0.5 + 0.5 * 0.15}, 1e-9)


def test_the_rate_is_taken_over_the_normal_pixels_of_good_images_too():
    heat, mask = np.zeros((1, 10, 10)), np.zeros((1, 10, 10), bool)
    heat[0, :2], mask[0, 5, 5] = 2.0, True
    heat[0, 5, 5] = 1.0
    alone, good = [(heat, mask)], [(np.zeros((3, 10, 10)), np.zeros((3, 10, 10), bool))]
    rate = 20 / 99
    want = 1 - rate / 0.3
    assert histogram(alone).metrics()["aupro"] == pytest.approx(want, abs=1e-9)
    assert histogram(alone + good).metrics()["aupro"] == pytest.approx(1 - 20 / 399 / 0.3, abs=1e-9)


@pytest.mark.parametrize("deviation", [2500 * 2**-16, 1.0])
def test_metrics_of_raw_maps_are_within_a_ten_thousandth(deviation):
    parts = natural(20, 200, deviation, 0)
    near(histogram(parts).metrics(), by_definition(parts), 1e-4)


# --- the published variant


@settings(deadline=None, max_examples=100)
@given(rounded(), st.integers(0, 10**6))
def test_the_published_variant_is_the_papers_loop(case, seed):
    # The values spread over d bins, where d shares no factor with 200: no threshold but the first comes
    # nearer to a middle than 1/200 of a bin, so that rounding cannot move one past a value.
    (low, high, bins), parts = case
    rng = np.random.default_rng(seed)
    span = [d for d in range(1, min(bins, 10**5)) if d % 2 and d % 5] if bins > 1 else [0]
    d = int(rng.choice(span[-1:] + span))
    start = int(rng.integers(0, bins - d))
    low_value, high_value = min(maps.min() for maps, _ in parts), max(maps.max() for maps, _ in parts)
    spread = max(high_value - low_value, 1e-9)
    moved = [
        (middles(start + np.rint((maps - low_value) / spread * d), low, high, bins), masks)
        for maps, masks in parts
    ]
    near(histogram(moved, low, high, bins).metrics("published"), by_definition(moved, "published"), 1e-9)


@pytest.mark.parametrize("deviation", [2500 * 2**-16, 1.0])
def test_the_published_variant_of_raw_maps_is_within_a_thousandth(deviation):
    parts = natural(8, 200, deviation, 5)
    near(
        {"aupro": histogram(parts).metrics("published")["aupro"]},
        {"aupro": published_pro(*flat(parts))},
        1e-3,
    )


def test_the_published_variant_worked_out_by_hand():
    # Thresholds from 0 to 0.995 of 1; normal pixels: 75 at 0, 10 at 0.3, 10 at 0.6, 4 at 0.9025, 1 at 1.
    normal = np.repeat([0.0, 0.3012, 0.6012, 0.9012, 1.0], [75, 10, 10, 4, 1])
    values = np.concatenate([normal, [0.8012, 0.4012, 0.95012, 0.2012]])[None, None]
    masks = np.array([[[*[False] * 100, True, True, True, True]]])  # a region of four
    # (rate, overlap): 0.25 with 1 and 3/4, 0.15 with 3/4 and 1/2, 0.05 with 1/2 and 1/4, 0.01 with 1/4 and 0.
    # What is left of the steps: 0.25 to 0.15 at 3/4, to 0.05 at 1/2, to 0.01 at 1/4.
    want = (0.1 * 0.75 + 0.1 * 0.5 + 0.04 * 0.25) / 0.24
    found = histogram([(values, masks)])
    assert found.metrics("published")["aupro"] == pytest.approx(want, abs=1e-9)
    assert found.metrics("published") | dict(aupro=0) == found.metrics() | dict(
        aupro=0
    )  # no other number moves
    assert found.metrics() == found.metrics("exact") and found.metrics()["aupro"] != pytest.approx(
        want, abs=0.01
    )


def test_the_published_variant_takes_its_thresholds_from_the_least_and_largest_value():
    parts = natural(8, 40, 0.05, 2)
    far = np.full((1, 1, 9), 0.4), np.zeros((1, 1, 9), bool)
    far[0][0, 0, 0], far[0][0, 0, 1] = -7.9, 6.3  # two pixels that move all the thresholds
    scores = [published_pro(*flat(p)) for p in (parts, parts + [far])]
    assert abs(scores[0] - scores[1]) > 0.01
    for p, want in zip((parts, parts + [far]), scores, strict=True):
        assert histogram(p).metrics("published")["aupro"] == pytest.approx(want, abs=1e-3)


def test_the_published_variant_keeps_the_first_threshold_and_drops_a_rate_of_three_tenths():
    for normal in (
        np.repeat([0.0, 0.002, 1.0], [75, 20, 5]),  # above the first threshold a quarter, then a twentieth
        np.repeat([0.0, 0.3012, 0.6012, 1.0], [70, 10, 15, 5]),  # exactly 0.3 at first
    ):
        heat, mask = np.append(normal, [0.0, 0.001, 0.5, 1.0])[None, None], np.arange(104)[None, None] >= 100
        want = published_pro(*flat([(heat, mask)]))
        assert histogram([(heat, mask)]).metrics("published")["aupro"] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 10,  # one value: every threshold is it
        [0.0] * 5 + [1.0] * 5,  # half of the normal pixels above every threshold: no point
        [0.0] * 5 + [0.993] * 3 + [1.0] * 2,  # one point
        [0.0] * 8 + [1.0] * 2,  # 200 points of one rate: no rate to renormalise
    ],
)
def test_the_published_variant_is_undefined_without_two_points(values):
    heat, mask = np.array([[[*values, values[0]]]]), np.array([[[False] * 10 + [True]]])
    assert published_pro(*flat([(heat, mask)])) is None
    found = histogram([(heat, mask)])
    assert found.metrics("published")["aupro"] is None
    assert None not in found.metrics("exact").values()
    assert None not in list(found.metrics("published").values())[:3]


def test_only_the_two_variants_are_known():
    with pytest.raises(ValueError, match="pro"):
        histogram([]).metrics("both")


# --- adding up


def on_disk(found: PixelHistogram) -> PixelHistogram:
    """Through a file and back."""
    buffer = io.BytesIO()
    torch.save(found.state(), buffer)
    buffer.seek(0)
    return PixelHistogram.from_state(torch.load(buffer, weights_only=True))


@settings(deadline=None, max_examples=60)
@given(rounded(), st.data())
def test_however_the_images_are_split_and_merged_the_digits_are_the_same(case, data):
    bins, parts = case
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    parts = [(np.clip(maps + rng.normal(0, 0.01), *bins[:2]), masks) for maps, masks in parts]  # raw
    whole = histogram(parts, *bins)
    singles = [(maps[i : i + 1], masks[i : i + 1]) for maps, masks in parts for i in range(len(maps))]
    shares = data.draw(st.integers(1, 3))
    owners = [data.draw(st.integers(0, shares - 1)) for _ in singles]
    order = data.draw(st.permutations(range(len(singles))))
    pieces = [histogram([singles[i] for i in order if owners[i] == n], *bins) for n in range(shares)]
    pieces = [on_disk(piece) if data.draw(st.booleans()) else piece for piece in pieces]
    total = PixelHistogram(*bins) if data.draw(st.booleans()) else pieces.pop()
    for piece in data.draw(st.permutations(pieces)):
        total.merge(piece)
    assert same(total, whole)
    _, truth, _, regions = flat(parts)
    assert total.regions == regions and total.counts[:2].sum(1).tolist() == [(~truth).sum(), truth.sum()]


def test_merging_does_not_touch_the_other_and_goes_on():
    parts = natural(8, 30, 0.5, 1)
    first, second = histogram(parts[:1]), histogram(parts[1:])
    before = copy.deepcopy(second)
    first.merge(second)
    assert same(second, before) and same(first, histogram(parts))
    first.update(*map(torch.from_numpy, parts[0]))
    assert same(first, histogram([*parts, parts[0]])) and same(second, before)


def test_a_histogram_comes_back_from_its_state_and_goes_on():
    parts = natural(8, 30, 0.5, 1)
    found = on_disk(histogram(parts[:1]))
    assert (found.low, found.high, found.bins) == (-8, 8, 2**20) and same(found, histogram(parts[:1]))
    found.update(*map(torch.from_numpy, parts[1]))
    assert same(found, histogram(parts))
    assert same(on_disk(PixelHistogram(0, 1, 9)), PixelHistogram(0, 1, 9))


def test_a_state_is_of_its_moment_and_shares_nothing():
    parts = natural(8, 30, 0.5, 1)
    want, found = histogram(parts[:1]), histogram(parts[:1])
    state = found.state()
    found.update(*map(torch.from_numpy, parts[1]))  # must not reach into the state
    assert same(PixelHistogram.from_state(state), want)
    again = PixelHistogram.from_state(state)
    again.merge(histogram(parts[1:]))  # nor must what was rebuilt from it
    assert same(again, histogram(parts)) and same(found, again)
    assert same(PixelHistogram.from_state(state), want)


@pytest.mark.parametrize("other", [(-8, 8, 99), (-8, 7, 100), (-7, 8, 100)])
def test_histograms_of_other_bins_do_not_merge(other):
    parts = [(np.full((1, 2, 2), 0.3), np.eye(2, dtype=bool)[None])]
    found, other = histogram(parts, -8, 8, 100), histogram(parts, *other)
    with pytest.raises(ValueError):
        found.merge(other)
    assert same(found, histogram(parts, -8, 8, 100))


def test_regions_of_one_image_do_not_join_those_of_the_next():
    masks = np.zeros((4, 3, 5), bool)
    masks[:2] = masks[2, -1] = masks[3, 0] = True
    together = histogram([(np.zeros(masks.shape), masks)])
    assert together.regions == 4
    assert same(together, histogram([(np.zeros((1, 3, 5)), mask[None]) for mask in masks]))


def test_more_than_half_a_million_regions_are_as_good_as_a_few():
    # Copies change none of the metrics: 9,604 regions, doubled until there are ten million.
    rng, masks = np.random.default_rng(0), np.zeros((1, 197, 197), bool)
    masks[0, 1::2, 1::2] = True
    found = histogram([(rng.normal(0, 1, masks.shape).clip(-4, 4) + masks, masks)])
    want = {pro: found.metrics(pro) for pro in ("exact", "published")}
    for doubled in range(1, 11):
        found.merge(copy.deepcopy(found))
        assert found.regions == 98**2 * 2**doubled
        for pro in want:
            near(found.metrics(pro), want[pro], 1e-9)


def test_memory_does_not_grow_with_the_images():
    found, part = PixelHistogram(-8, 8, 1000), natural(4, 20, 0.5, 0)[0]
    sizes = set()
    for _ in range(20):
        found.update(*map(torch.from_numpy, part))
        tensors = [x for x in vars(found).values() if isinstance(x, torch.Tensor)]
        assert not [x for x in vars(found).values() if isinstance(x, list | dict | set)]
        sizes.add(sum(x.numel() * x.element_size() for x in tensors))
    assert len(sizes) == 1 and sizes.pop() < 1000 * 3 * 8 + 100
    assert PixelHistogram(-8, 8).bins == 2**20  # the default


def test_the_map_and_the_masks_are_left_as_they_were():
    maps, masks = torch.randn(2, 9, 9).clamp(-4, 4), torch.rand(2, 9, 9) < 0.5
    copies = maps.clone(), masks.clone()
    PixelHistogram(-8, 8).update(maps, masks)
    assert torch.equal(maps, copies[0]) and torch.equal(masks, copies[1])


# --- what is undefined, and what is refused


def test_what_is_undefined_is_none():
    found = PixelHistogram(-8, 8)
    for pro in ("exact", "published"):
        assert found.metrics(pro) == NONE  # nothing seen
    for kind in (False, True):
        found = histogram([(np.random.default_rng(0).normal(0, 1, (2, 5, 5)), np.full((2, 5, 5), kind))])
        for pro in ("exact", "published"):
            assert found.metrics(pro) == NONE
    for shape in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        found = histogram([(np.zeros(shape), np.zeros(shape, bool))])
        assert same(found, PixelHistogram(-8, 8)) and found.metrics() == NONE


def test_full_masks_and_empty_ones_together_are_defined():
    masks = np.stack([np.ones((7, 7), bool), np.zeros((7, 7), bool)])
    parts = [(middles(np.random.default_rng(0).integers(0, 30, masks.shape) + 9 * masks, 0, 1, 99), masks)]
    assert None not in histogram(parts, 0, 1, 99).metrics().values()
    for pro in ("exact", "published"):
        near(histogram(parts, 0, 1, 99).metrics(pro), by_definition(parts, pro), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.001, -1.001, math.nan, math.inf, -math.inf])
def test_values_outside_the_range_are_refused_and_not_counted(value, dtype):
    maps, masks = torch.zeros(2, 4, 4, dtype=dtype), torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1, 1] = True
    found = PixelHistogram(-1, 1, 50)
    found.update(maps, masks)
    before = copy.deepcopy(found)
    for place in ((0, 1, 1), (1, 3, 3), (0, 0, 0)):
        bad = maps.clone()
        bad[place] = value * (1.01 if dtype in (torch.bfloat16, torch.float16) else 1)
        with pytest.raises(ValueError):
            found.update(bad, masks)
    assert same(found, before)


@pytest.mark.parametrize("bins", [1, 3, 1000, 2**20])
@pytest.mark.parametrize("low, high", [(-8.0, 8.0), (-0.1, 0.7), (1 / 3, 2 / 3), (-1e-3, 0.0), (0.0, 1e4)])
def test_both_ends_of_the_range_are_in_it(low, high, bins):
    maps = torch.tensor([[[low, high, high, low]]], dtype=torch.float64)
    found = PixelHistogram(low, high, bins)
    found.update(maps, torch.tensor([[[False, True, False, False]]]))
    assert found.counts[0, 0] == (3 if bins == 1 else 2) and found.counts[1, -1] == 1
    assert found.counts[:2].sum() == 4
    near(found.metrics(), by_definition([(maps.numpy() if bins > 1 else maps.numpy() * 0,
                                          np.array([[[False, True, False, False]]]))]), 1e-9)  # fmt: skip


def test_a_value_counts_in_the_bin_it_lies_in():
    width, rng = 16 / 2**20, np.random.default_rng(0)
    places = rng.integers(0, 2**20, (1, 30, 30))
    for offset in (0.0, 0.01, 0.5, 0.99):
        found = histogram([(-8 + (places + offset) * width, np.zeros(places.shape, bool))])
        want = np.bincount(places.ravel(), minlength=2**20)
        assert np.array_equal(found.counts[0].numpy(), want) and not found.counts[1:].any()


GOOD = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "maps, masks",
    [
        (GOOD[0], GOOD[1][:1]),
        (GOOD[0][:1], GOOD[1]),
        (GOOD[0], GOOD[1].mT),
        (GOOD[0], GOOD[1][:, None]),
        (GOOD[0], GOOD[1][0]),
        (GOOD[0][0], GOOD[1][0]),
        (GOOD[0][:, None], GOOD[1][:, None]),
        (GOOD[0].flatten(), GOOD[1].flatten()),
        (torch.tensor(0.0), torch.tensor(False)),
        (GOOD[0].long(), GOOD[1]),
        (GOOD[0].byte(), GOOD[1]),
        (GOOD[0].bool(), GOOD[1]),
        (GOOD[0].cfloat(), GOOD[1]),
        (GOOD[0], GOOD[1].byte() + 2),
        (GOOD[0], GOOD[1].byte() + 255),
        (GOOD[0], GOOD[1].long() - 1),
        (GOOD[0], GOOD[1].float() + 0.5),
        (GOOD[0], GOOD[1].float() + math.nan),
    ],
)
def test_maps_and_masks_of_other_forms_are_refused(maps, masks):
    found = PixelHistogram(-8, 8, 10)
    with pytest.raises(ValueError):
        found.update(maps, masks)
    assert same(found, PixelHistogram(-8, 8, 10))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float16])
def test_masks_of_zeros_and_ones_are_masks(dtype):
    part = natural(4, 20, 0.5, 0)[0]
    found = PixelHistogram(-8, 8)
    found.update(torch.from_numpy(part[0]), torch.from_numpy(part[1]).to(dtype))
    assert same(found, histogram([part]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_maps_of_every_precision_count_as_the_values_they_hold(dtype):
    maps, masks = natural(4, 40, 0.5, 3)[0]
    maps, found = torch.from_numpy(maps).to(dtype), PixelHistogram(-8, 8)
    found.update(maps.requires_grad_(), torch.from_numpy(masks))
    want = [(maps.detach().double().numpy(), masks)]
    assert same(found, histogram(want))
    near(found.metrics(), by_definition(want), 1e-3)
    near(found.metrics("published"), by_definition(want, "published"), 1e-3)


@pytest.mark.parametrize(
    "low, high, bins",
    [
        (1, 1, 9),
        (2, 1, 9),
        (0, 1, 0),
        (0, 1, -5),
        (math.nan, 1, 9),
        (0, math.nan, 9),
        (-math.inf, 1, 9),
        (0, math.inf, 9),
    ],
)
def test_an_empty_range_is_refused(low, high, bins):
    with pytest.raises(ValueError):
        PixelHistogram(low, high, bins)


# --- regions


def check_regions(masks: np.ndarray, tensor: torch.Tensor | None = None) -> None:
    want, regions = [], 0
    for mask in masks:
        found, n = regions_of(mask)
        areas = np.bincount(found.ravel()).tolist()
        want += [round(2**44 / areas[i]) for i in found[mask].tolist()]
        regions += n
    weights, count = region_weights(torch.from_numpy(masks) if tensor is None else tensor)
    assert weights.dtype == torch.int64 and weights.tolist() == want and int(count) == regions


@settings(deadline=None, max_examples=150)
@given(arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=12)))
@example(np.ones((1, 1, 1), bool))
@example(np.zeros((1, 1, 1), bool))
@example(np.ones((3, 1, 1), bool))
@example(np.ones((2, 1, 9), bool))
@example(np.ones((2, 9, 1), bool))
def test_weights_are_one_over_the_area_of_scipys_regions(masks):
    check_regions(masks)


@settings(deadline=None, max_examples=150)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    st.integers(0, 10**6),
)
def test_weights_are_scipys_at_every_density(shape, density, seed):
    check_regions(np.random.default_rng(seed).random(shape) < density)


@pytest.mark.parametrize("name", MASKS)
def test_weights_are_scipys_for_every_form_of_region(name):
    mask = MASKS[name]
    for form in (
        mask,
        ~mask,
        mask[::-1],
        mask[:, ::-1],
        mask.T,
        mask[1:-1],
        mask[:, 1:-1],
        mask[3:4],
        mask[:, 3:4],
    ):
        check_regions(np.ascontiguousarray(form)[None].repeat(2, 0))


@pytest.mark.parametrize(
    "make", [spiral, comb, nested, lambda n: np.arange(n * n).reshape(n, n) // 3 % 5 < 2]
)
def test_weights_are_scipys_for_long_regions(make):
    mask = make(151)
    for turns in (0, 3):
        check_regions(np.stack([np.rot90(mask, turns), np.rot90(mask, turns + 2)]))


def test_weights_are_scipys_at_the_size_of_a_photograph():
    noise = np.random.default_rng(0).random((400, 500))
    check_regions(np.stack([noise < 0.4, gaussian_filter(noise, 3) > 0.5, noise >= 0]))


def test_weights_are_in_raster_order_of_the_images_in_turn():
    masks = torch.tensor(
        [[[1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]], [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]]
    )
    weights, regions = region_weights(masks.bool())
    assert weights.tolist() == [2**44, 2**43, 2**43, 2**44, 2**42, 2**42, 2**42, 2**42] and int(regions) == 4


def test_masks_need_not_be_contiguous():
    noise = np.random.default_rng(0).random((6, 20, 30)) < 0.4
    whole = torch.from_numpy(noise)
    for view in (whole.mT, whole[::2], whole[:, 1::2], whole[:, :, ::3], whole[:, 2:-2, 2:-2],
                 whole.permute(2, 0, 1), whole[:, :, :1].expand(-1, -1, 7)):  # fmt: skip
        check_regions(view.numpy(), view)
    maps = torch.randn(6, 30, 20).clamp(-4, 4)
    strided, plain = PixelHistogram(-8, 8), PixelHistogram(-8, 8)
    strided.update(maps.mT[:, ::2], whole[:, ::2])
    plain.update(maps.mT[:, ::2].contiguous(), whole[:, ::2].contiguous())
    assert same(strided, plain)


def test_images_of_a_batch_do_not_join():
    for masks in (
        np.ones((5, 1, 1), bool),
        np.ones((5, 3, 4), bool),
        np.ones((5, 1, 4), bool),
        np.stack(
            [
                MASKS["bottom"],
                MASKS["top"],
                MASKS["bottom"],
                MASKS["corners"],
                MASKS["corners"],
                MASKS["full"],
            ]
        ),
        np.stack(
            [MASKS["sides"], MASKS["right"], MASKS["left"], MASKS["frame"], MASKS["empty"], MASKS["frame"]]
        ),
    ):
        check_regions(masks)


def test_masks_without_a_region_have_no_weights():
    for shape in ((1, 1, 1), (3, 5, 7), (0, 5, 7)):
        weights, regions = region_weights(torch.zeros(shape, dtype=torch.bool))
        assert weights.shape == (0,) and weights.dtype == torch.int64 and int(regions) == 0


# --- image metrics


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.one_of(st.integers(-2, 2), st.floats(-100, 100, width=32))),
        min_size=1,
    )
)
def test_image_metrics_are_scikit_learns(rows):
    labels, scores = zip(*rows, strict=True)
    want = by_sklearn(np.array(labels) == 1, np.array(scores, float))
    near(image_metrics(labels, scores), want, 1e-12)


def test_image_metrics_of_many_images_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    for scores in (rng.normal(labels, 1), np.round(rng.normal(labels, 1), 1), labels * 1.0, -labels * 1.0):
        near(image_metrics(labels, scores), by_sklearn(labels == 1, scores), 1e-12)


def test_image_scores_are_not_rounded():
    labels, scores = [0, 1, 0, 1, 1, 0], [0.5, 0.5 + 1e-15, 0.5 + 2e-15, 1e300, -1e300, 0.5]
    near(image_metrics(labels, scores), by_sklearn(np.array(labels) == 1, np.array(scores)), 1e-12)
    near(image_metrics([0, 1], [0.0, -0.0]), dict(auroc=0.5, f1_max=2 / 3, ap=0.5), 1e-12)


@pytest.mark.parametrize("labels", [[0], [1], [0, 0, 0], [1, 1], []])
def test_image_metrics_of_one_kind_are_none(labels):
    assert image_metrics(labels, [0.5] * len(labels)) == dict(auroc=None, f1_max=None, ap=None)


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda x: torch.tensor(x).double(),
        lambda x: np.array(x, np.float32),
    ],
)
def test_image_metrics_take_lists_arrays_and_tensors(form):
    labels, scores = [0, 1, 1, 0, 1], [0.25, 0.5, 0.125, 0.5, 1.0]
    assert image_metrics(form(labels), form(scores)) == image_metrics(labels, scores)
    near(image_metrics(labels, scores), by_sklearn(np.array(labels) == 1, np.array(scores)), 1e-12)
    assert image_metrics([bool(x) for x in labels], form(scores)) == image_metrics(labels, scores)


@pytest.mark.parametrize(
    "labels, scores",
    [
        ([0, 2], [0.1, 0.2]),
        ([0, -1], [0.1, 0.2]),
        ([0, 0.5], [0.1, 0.2]),
        ([0, math.nan], [0.1, 0.2]),
        ([0, 1, 1], [0.1, 0.2]),
        ([0, 1], [0.1, 0.2, 0.3]),
        ([0, 1], []),
        ([], [0.1]),
        ([0], [0.1, 0.2]),
        ([[0, 1]], [[0.1, 0.2]]),
        (1, 0.5),
        ([0, 1], [0.1, math.nan]),
        ([0, 1], [math.inf, 0.2]),
        ([0, 1], [0.1, -math.inf]),
        ([1, 1], [0.1, math.nan]),
    ],
)
def test_bad_labels_and_scores_are_refused(labels, scores):
    with pytest.raises(ValueError):
        image_metrics(labels, scores)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(any), max_size=30))
def test_a_ranking_of_counts_is_scikit_learns_of_the_scores_they_stand_for(rows):
    counts = np.array(rows, np.int64).reshape(-1, 2)
    truth = np.tile([True, False], len(rows)).repeat(counts.ravel())
    values = -np.arange(len(rows)).repeat(counts.sum(1))
    want = by_sklearn(truth, values)
    near(ranking(*counts.T), want, 1e-12)
    near(ranking(*counts.T * 10**6), want, 1e-9)  # the counts of a large dataset


def test_arrays_are_taken_too():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((2, 9, 8)), rng.random((2, 9, 8)) > 0.7
    a, b = PixelHistogram(0, 1), PixelHistogram(0, 1)
    a.update(maps, masks)
    b.update(torch.from_numpy(maps), torch.from_numpy(masks))
    assert torch.equal(a.counts, b.counts) and a.metrics() == b.metrics()
