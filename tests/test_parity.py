"""The authors' program's numbers, stage by stage, from the same weights: pytest tests/test_parity.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CLIP, OFFICIAL
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from visualad import VisualAD, image_score, smooth


@pytest.mark.parametrize("final_norm", [None, "backbone", "checkpoint"])
def test_every_stage_equals_the_authors_program(golden, final_norm):
    path = f"{final_norm or 'backbone'}_ln_post"
    model = VisualAD.from_pretrained(OFFICIAL, backbone_weights=CLIP, final_norm=final_norm)
    sca = {}
    for layer in model.layers:
        model.sca[str(layer)].register_forward_hook(lambda _m, _i, out, n=layer: sca.update({n: out}))
    images = golden["images"]
    with torch.no_grad():
        z = model.backbone((images - model.mean) / model.std, model.tokens, model.layers, model.norm)
        out = model(images)
    smoothed, score = model.infer(images)
    ours = {
        "anomaly_features": z[4][:, 0],
        "normal_features": z[4][:, 1],
        "patch_tokens": torch.stack([z[layer][:, 3:] for layer in (2, 4)], 1),
        "sca_anomaly": torch.stack([sca[layer][:, 0] for layer in (2, 4)], 1),
        "sca_normal": torch.stack([sca[layer][:, 1] for layer in (2, 4)], 1),
        "layer_maps": out.layer_maps,
        "fused_map": out.map,
        "smoothed_map": smoothed,
        "score": score,
    }
    assert {f"{path}/{name}" for name in ours} == {key for key in golden if key.startswith(path)}
    for name, value in ours.items():
        told = dict(rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(value, golden[f"{path}/{name}"], **told)
    assert torch.equal(out.tokens[:, 0], ours["sca_anomaly"][:, -1])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.2, 12), st.integers(0, 99))
def test_smoothing_is_scipys_gaussian_filter(h, w, sigma, seed):
    maps = np.random.default_rng(seed).normal(size=(2, h, w))
    want = np.stack([gaussian_filter(m, sigma) for m in maps])
    np.testing.assert_allclose(smooth(torch.from_numpy(maps), sigma).numpy(), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size, k", [((518, 518), 2684), ((10, 10), 1), ((10, 11), 2), ((3, 3), 1)])
def test_the_score_is_the_mean_of_the_brightest_percent_rounded_up(size, k):
    maps = torch.rand(2, *size, dtype=torch.float64)
    want = [np.sort(m.numpy().ravel())[-k:].mean() for m in maps]
    np.testing.assert_allclose(image_score(maps).numpy(), want, rtol=1e-12)
