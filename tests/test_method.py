"""What the method promises whatever the weights: pytest tests/test_method.py"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from visualad import ACTIVATIONS, BACKBONES, Backbone, Block, VisualAD, smooth, upsample


def test_layers_are_sorted_and_counted_once():
    assert VisualAD(SMALL, layers=(4, 2, 2)).layers == (2, 4)


def test_swapping_the_tokens_flips_the_map(model):
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        before = model(images)
        model.tokens.data = model.tokens.data.flip(0)
        after = model(images)
    torch.testing.assert_close(after.map, -before.map, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.tokens, before.tokens.flip(1), rtol=0, atol=1e-5)


def test_an_sca_of_scale_zero_hands_the_token_on(model):
    sca = model.sca["2"]
    tokens, patches = torch.randn(3, 2, 64), torch.randn(3, 16, 64)
    assert not torch.equal(sca(tokens, patches, (4, 4)), tokens)
    sca.alpha.data.zero_()
    assert torch.equal(sca(tokens, patches, (4, 4)), tokens)


def test_each_token_drops_attention_of_its_own_in_training(model):
    sca = model.sca["2"].train()
    torch.manual_seed(0)
    tokens = torch.randn(1, 1, 64).expand(-1, 2, -1)
    sca.dropout.p, patches = 0.5, torch.randn(1, 16, 64)
    dropout, calls = sca.dropout.forward, []
    for kept in (
        0,
        1,
    ):  # SCA drops twice, in the attention and in what it puts out: look at one of them alone
        calls.clear()

        def one(x, kept=kept):
            calls.append(x.shape)
            return dropout(x) if len(calls) - 1 == kept else x

        sca.dropout.forward = one
        a, n = sca(tokens, patches, (4, 4)).unbind(1)
        assert not torch.equal(a, n) and calls == [(1, 8, 16), (1, 2, 64)]


def test_fresh_modules_start_as_the_program_starts_them():
    torch.manual_seed(0)
    model = VisualAD("dinov2-vit-s14", layers=(3, 12))
    assert model.tokens.std().item() == pytest.approx(0.1 / 384**0.5, rel=0.1)
    for sca in model.sca.values():
        assert sca.alpha.item() == pytest.approx(0.01) and sca.dropout.p == 0.1
        assert sca.anchors.shape == (4, 384) and sca.pos.shape == (37, 37, 384)
        for table in (sca.anchors, sca.pos):
            assert table.std().item() == pytest.approx(0.02, rel=0.1)
        for linear in (sca.q, sca.k, sca.v, sca.out):  # Xavier uniform: +- sqrt(6 / (in + out))
            assert linear.weight.abs().max().item() == pytest.approx((6 / 768) ** 0.5, rel=0.01)
        assert (
            sca.q.bias is sca.k.bias is sca.v.bias is None and not sca.out.bias.any() and sca.gate.bias.any()
        )
        assert sca.gate.weight.abs().max() <= 384**-0.5
    for saf in model.saf.values():
        assert not saf.fc1.bias.any() and not saf.fc2.bias.any() and saf.dropout.p == 0.1
        for linear in (saf.fc1, saf.fc2):
            assert linear.weight.abs().max().item() == pytest.approx((6 / 768) ** 0.5, rel=0.01)
    assert model.norm.eps == model.backbone.norm.eps == 1e-6 and VisualAD("clip-vit-b32").norm.eps == 1e-5


def test_saf_is_two_layers_each_followed_by_dropout(model):
    saf, x = model.saf["2"], torch.randn(2, 16, 64)
    torch.testing.assert_close(saf(x), saf.fc2(torch.nn.functional.gelu(saf.fc1(x))))
    saf.train().dropout.p = 0.5
    saf.fc1.weight.data.zero_()
    saf.fc1.bias.data.fill_(1.0)  # 64 equal inner values, of which dropout takes about half
    saf.fc2.weight.data.copy_(torch.eye(64))
    out = saf(x).detach()
    inner = torch.nn.functional.gelu(torch.tensor(1.0))
    values = (out / inner).round(decimals=3).unique().tolist()
    assert values == [0.0, 4.0]  # once doubled by each dropout, or dropped
    assert (out == 0).float().mean().item() == pytest.approx(0.75, abs=0.08)


def test_each_image_is_scored_alone(model):
    images = torch.rand(3, 3, 56, 56)
    together = model.infer(images)
    for i in range(3):
        alone = model.infer(images[i : i + 1])
        torch.testing.assert_close(alone[0][0], together[0][i], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone[1][0], together[1][i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(56, 56), (42, 98), (14, 140)])
def test_infer_is_forwards_map_smoothed_and_scored(model, size):
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        out = model(images)
    assert out.map.shape == (2, *size) and out.layer_maps.shape == (2, 2, *size)
    torch.testing.assert_close(out.layer_maps.sum(1), out.map)
    smoothed, score = model.infer(images, sigma=2.0)
    torch.testing.assert_close(smoothed, smooth(out.map, 2.0), rtol=0, atol=1e-5)
    assert not smoothed.requires_grad and not score.requires_grad
    plain, plain_score = model.infer(images, sigma=0)
    torch.testing.assert_close(plain, out.map, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain_score, out.score, rtol=0, atol=1e-5)


def test_the_tokens_are_the_last_blocks_also_where_that_is_not_tapped():
    torch.manual_seed(0)
    model, images = VisualAD(SMALL, layers=(1, 2)).eval(), torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        z = model.backbone((images - model.mean) / model.std, model.tokens, (1, 2), model.norm)
        want = model.sca["2"](z[4][:, :2], z[2][:, -16:], (4, 4))
        torch.testing.assert_close(model(images).tokens, want, rtol=0, atol=1e-5)


def test_infer_has_no_dropout_and_leaves_the_mode_as_it_was(model):
    images = torch.rand(1, 3, 56, 56)
    want = model.infer(images)[0]
    model.train()
    model.saf["2"].eval()
    model.infer(images)
    assert model.training and model.sca["2"].dropout.training and not model.saf["2"].training
    model.train()
    assert not torch.equal(model(images).map, model(images).map)
    assert torch.equal(model.infer(images)[0], want) and model.training and model.sca["2"].training
    model.backbone.forward = None  # whatever goes wrong inside
    with pytest.raises(TypeError):
        model.infer(images)
    assert model.training and model.sca["2"].training


def test_what_is_learned_is_what_has_a_gradient(model):
    out = model.train()(torch.rand(2, 3, 56, 56))
    assert out.tokens.requires_grad
    (out.map.mean() + out.tokens.sum()).backward()
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.learned()) and {"tokens", "norm.weight", "norm.bias"} < trained
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in trained), key


def test_the_trained_norm_is_used_and_the_backbones_own_kept(model):
    images = torch.rand(1, 3, 56, 56)
    plain, before = model.backbone(images), model(images).map
    model.norm.weight.data += torch.rand(64)
    assert not torch.equal(model(images).map, before)
    assert torch.equal(model.backbone(images)[4], plain[4])


def test_without_guests_the_backbone_is_a_plain_vit(model):
    images = torch.rand(1, 3, 56, 56)
    assert model.backbone(images)[4].shape == (1, 17, 64)
    before = model.backbone(images)[4]
    model.tokens.data += 1
    model.norm.weight.data += 1
    assert torch.equal(model.backbone(images)[4], before)


def test_sca_positions_are_resampled_to_the_grid(model):
    table = model.sca["4"].pos
    seen = []
    model.sca["4"].k.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    patches = torch.zeros(1, 21, 64)
    model.sca["4"](torch.zeros(1, 2, 64), patches, (3, 7))
    want = upsample(table.permute(2, 0, 1)[None], (3, 7))[0].permute(1, 2, 0).reshape(1, 21, 64)
    torch.testing.assert_close(seen[0], want)


def test_forward_compiles_as_one_graph(model):
    images = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        got, want = torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_batch_of_any_size_is_exported(model):
    batch = {"images": {0: torch.export.Dim("B", min=2)}}
    exported = torch.export.export(model, (torch.rand(2, 3, 56, 56),), dynamic_shapes=batch).module()
    images = torch.rand(3, 3, 56, 56)
    torch.testing.assert_close(exported(images)[0], model(images)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_whole_model_goes_through_a_pickle(activation):
    model, images = VisualAD(replace(SMALL, activation=activation)), torch.rand(1, 3, 56, 56)
    assert torch.equal(pickle.loads(pickle.dumps(model)).infer(images)[0], model.infer(images)[0])


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(3, 56, 56), r"\[3, 56, 56\]"),
        (torch.rand(1, 4, 56, 56), r"\[1, 4, 56, 56\]"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), "uint8"),
        ([1, 2], "list"),
        (None, "NoneType"),
        (torch.rand(1, 3, 56, 60), "60; near: 56, 70"),
        (torch.rand(1, 3, 7, 56), "7; near: 14, 28"),
        (torch.rand(1, 3, 0, 56), r"\[1, 3, 0, 56\]"),
        (torch.rand(0, 3, 56, 56), r"\[0, 3, 56, 56\]"),
    ],
)
def test_bad_images_are_named_at_the_door(model, images, message):
    for call in (model, model.infer):
        with pytest.raises(ValueError, match=message):
            call(images)


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_bad_sigmas_are_refused(model, sigma):
    with pytest.raises(ValueError, match="sigma"):
        model.infer(torch.rand(1, 3, 56, 56), sigma=sigma)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(backbone="clip-vit-l15"), "clip-vit-l14-336"),
        (dict(backbone=SMALL, layers=(1, 5)), r"1\.\.4"),
        (dict(backbone=SMALL, image_size=60), "near: 56, 70"),
    ],
)
def test_bad_models_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisualAD(**arguments)


def test_a_half_precision_backbone_keeps_what_was_learned_in_fp32(model):
    images = torch.rand(2, 3, 56, 56)
    want = model.infer(images)[0]
    for name, parameter in model.backbone.named_parameters():
        parameter.data = parameter.data if name.startswith("norm.") else parameter.data.bfloat16()
    got = model.infer(images)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)


def test_the_faster_bf16_attention_of_a_cpu_is_the_same_attention(model):
    block, x = model.backbone.blocks[0].bfloat16(), torch.randn(3, 21, 64).bfloat16()
    block.qkv.weight.data[:128] *= 6  # flat attention would be the same under any scale
    fused = block(x)  # with gradients: torch's own kernel
    with torch.no_grad():
        torch.testing.assert_close(block(x), fused, rtol=0, atol=0.05)
        wide = Block(Backbone(192, 1, 3, 14, 4)).bfloat16()  # an odd number of heads
        x = torch.randn(3, 21, 192).bfloat16()
        torch.testing.assert_close(wide(x).float(), copy.deepcopy(wide).float()(x.float()), rtol=0, atol=0.1)


def test_input_sizes_of_the_list_are_multiples_of_their_patch():
    with torch.device("meta"):
        sizes = {name: VisualAD(name).image_size for name in BACKBONES if "g14" not in name}
    assert sizes.pop("tiny") == 224 and sizes.pop("clip-vit-b32") == sizes.pop("clip-vit-b16") == 512
    assert set(sizes.values()) == {518}
