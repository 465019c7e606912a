"""What the method promises whatever the weights, in Python and out of it: pytest tests/test_method.py"""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import onnxruntime
import pytest
import torch
from conftest import SMALL

from visualad import ACTIVATIONS, Backbone, Block, VisualAD, smooth, upsample


def close(got, want, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=0, atol=atol)


def test_each_token_drops_attention_and_output_of_its_own_in_training(model):
    sca, tokens = model.sca["2"], torch.zeros(200, 2, 64)
    sca.dropout = 0.5
    for linear in (sca.v, sca.out):
        linear.weight.data = torch.eye(64)
    sca.gate.bias.data.zero_()  # 4 anchors, each let in by half
    sca.alpha.data.fill_(1)
    one = torch.ones(200, 1, 64)  # a single patch, to which all attention goes
    close(sca(tokens, one, (1, 1)), torch.full((200, 2, 64), 2.0))
    out = sca(tokens, one, (1, 1), drop=True).round(decimals=4)
    kept = out.amax(dim=2) / 2  # of a token's 4 anchors: each counts 1 when it is kept
    assert kept.unique().tolist() == [0, 1, 2, 3, 4] and kept.mean().item() == pytest.approx(2, abs=0.3)
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert ((out == 0) | (out == 2 * kept[..., None])).all()  # the second drops of what is put out
    assert (out[kept > 0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(out[:, 0] == 0, out[:, 1] == 0)


def test_saf_is_two_layers_each_followed_by_dropout(model):
    saf, x = model.saf["2"], torch.randn(2, 16, 64)
    close(saf(x), saf.fc2(torch.nn.functional.gelu(saf.fc1(x))))
    saf.dropout = 0.5
    saf.fc1.weight.data.zero_()
    saf.fc1.bias.data.fill_(1.0)  # 64 equal inner values, of which dropout takes about half
    saf.fc2.weight.data.copy_(torch.eye(64))
    out = saf(x, drop=True).detach() / torch.nn.functional.gelu(torch.tensor(1.0))
    assert out.round(decimals=3).unique().tolist() == [0.0, 4.0]  # doubled by each dropout, or dropped
    assert (out == 0).float().mean().item() == pytest.approx(0.75, abs=0.08)


def test_fresh_modules_start_as_the_program_starts_them():
    torch.manual_seed(0)
    model, xavier = VisualAD("dinov2-vit-s14", layers=(3, 12)), (6 / 768) ** 0.5  # +- sqrt(6 / (in + out))
    assert model.tokens.std().item() == pytest.approx(0.1 / 384**0.5, rel=0.1)
    for sca, saf in zip(model.sca.values(), model.saf.values(), strict=True):
        assert sca.alpha.item() == pytest.approx(0.01) and sca.dropout == saf.dropout == 0.1
        assert sca.anchors.shape == (4, 384) and sca.pos.shape == (37, 37, 384)
        for table in (sca.anchors, sca.pos):
            assert table.std().item() == pytest.approx(0.02, rel=0.1)
        for linear in (sca.q, sca.k, sca.v, sca.out, saf.fc1, saf.fc2):
            assert linear.weight.abs().max().item() == pytest.approx(xavier, rel=0.01)
        assert sca.q.bias is sca.k.bias is sca.v.bias is None
        assert not any(linear.bias.any() for linear in (sca.out, saf.fc1, saf.fc2)) and sca.gate.bias.any()
        assert sca.gate.weight.abs().max() <= 384**-0.5
    assert model.norm.eps == model.backbone.norm.eps == 1e-6 and VisualAD("clip-vit-b32").norm.eps == 1e-5


def test_each_image_is_scored_alone_and_swapping_the_tokens_flips_the_map(model):
    images = torch.rand(3, 3, 56, 56)
    alone = [model.infer(image) for image in images.split(1)]
    for got, want in zip(zip(*alone, strict=True), model.infer(images), strict=True):
        close(torch.cat(got), want)
    before = model(images)
    model.tokens.data = model.tokens.data.flip(0)
    after = model(images)
    close(after.map, -before.map)
    close(after.tokens, before.tokens.flip(1))


@pytest.mark.parametrize("size", [(56, 56), (42, 98), (14, 140)])
def test_infer_is_forwards_map_smoothed_and_scored(model, size):
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        out = model(images)
    assert out.map.shape == (2, *size) and out.layer_maps.shape == (2, 2, *size)
    close(out.layer_maps.sum(1), out.map)
    smoothed, score = model.infer(images, sigma=2.0)
    close(smoothed, smooth(out.map, 2.0))
    assert not smoothed.requires_grad and not score.requires_grad
    plain, plain_score = model.infer(images, sigma=0)
    close(plain, out.map)
    close(plain_score, out.score)


def test_the_tokens_are_the_last_blocks_also_where_that_is_not_tapped():
    torch.manual_seed(0)
    model, images = VisualAD(SMALL, layers=(2, 1, 2)).eval(), torch.rand(1, 3, 56, 56)
    assert model.layers == (1, 2)
    z = model.backbone((images - model.mean) / model.std, model.tokens, (1, 2), model.norm)
    close(model(images).tokens, model.sca["2"](z[4][:, :2], z[2][:, -16:], (4, 4)))


def test_a_model_in_training_predicts_without_dropout_also_from_two_threads(model):
    images = torch.rand(8, 3, 56, 56)
    want = [model.infer(image[None])[0] for image in images]
    model.train()
    assert not torch.equal(model(images).map, model(images).map)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda image: model.infer(image[None])[0], images)
        dropped = [model(images).map for _ in range(3)]  # while the others predict
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert not torch.equal(dropped[0], dropped[1]) and model.training
    assert torch.equal(model.eval()(images).map, model(images).map)


def test_sca_positions_are_resampled_to_the_grid(model):
    seen = []
    model.sca["4"].k.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.sca["4"](torch.zeros(1, 2, 64), torch.zeros(1, 21, 64), (3, 7))
    want = upsample(model.sca["4"].pos.permute(2, 0, 1)[None], (3, 7))[0].permute(1, 2, 0).reshape(1, 21, 64)
    close(seen[0], want)


def test_the_faster_bf16_attention_of_a_cpu_is_the_same_attention(model):
    block, x = model.backbone.blocks[0].bfloat16(), torch.randn(3, 21, 64).bfloat16()
    block.qkv.weight.data[:128] *= 6  # flat attention would be the same under any scale
    fused = block(x)  # with gradients: torch's own kernel
    with torch.no_grad():
        close(block(x), fused, atol=0.05)
        wide = Block(Backbone(192, 1, 3, 14, 4)).bfloat16()  # an odd number of heads
        x = torch.randn(3, 21, 192).bfloat16()
        close(wide(x).float(), copy.deepcopy(wide).float()(x.float()), atol=0.1)


# --- copies, compilers, exporters


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_backbone_compiled_in_place_is_used_and_the_model_still_copied(activation):
    model, graphs = VisualAD(replace(SMALL, activation=activation)), []
    images = torch.rand(2, 3, 56, 56)
    want = model.infer(images)[1]
    model.backbone.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    close(model.infer(images)[1], want)
    assert len(graphs) == 1
    copies = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module
    for other in (*copies, pickle.loads(pickle.dumps(model))):
        close(other.infer(images)[1], want)
        other.tokens.data.zero_()  # its own: one that ran the original's weights would not notice
        assert other.infer(images)[1].abs().max() < 0.1 * want.abs().max()
        close(model.infer(images)[1], want)


class Infer(torch.nn.Module):
    """What a program in another language calls: images -> smoothed map, score."""

    def __init__(self, model: VisualAD):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.infer(images)


def as_infer(run, model, *shapes):
    for shape in shapes:
        images = torch.rand(shape)
        for got, want in zip(run(images), model.infer(images), strict=True):
            close(got, want)


def test_onnx_and_a_saved_program_give_infers_map_and_score_for_any_batch_and_size(tmp_path):
    model, free = VisualAD.from_pretrained("tiny"), ({i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)},)
    images = torch.rand(2, 3, 224, 224)  # of the size of the table of positions: the likeliest
    program = torch.export.export(Infer(model), (images,), dynamic_shapes=free)
    torch.onnx.export(program, f=tmp_path / "a.onnx", input_names=["x"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    sizes = (224, 224), (160, 256), (80, 88)  # of which one percent is no whole number of pixels
    shapes = [(batch, 3, *size) for batch in (1, 3) for size in sizes]
    as_infer(lambda x: session.run(None, {"x": x.numpy()}), model, *shapes)
    torch.export.save(program, tmp_path / "a.pt2")
    as_infer(torch.export.load(tmp_path / "a.pt2").module(), model, *shapes)


@pytest.mark.parametrize("dtype, strict", [(torch.float32, True), (torch.bfloat16, False)])
def test_a_program_exported_at_the_models_own_size_keeps_sizes_free(model, dtype, strict):
    model.backbone.to(dtype)
    free = ({i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)},)
    program = torch.export.export(
        Infer(model), (torch.rand(2, 3, 56, 56),), dynamic_shapes=free, strict=strict
    )
    for shape in (1, 3, 56, 56), (3, 3, 84, 70):
        images = torch.rand(shape)
        for got, want in zip(program.module()(images), model.infer(images), strict=True):
            assert torch.allclose(got, want, atol=1e-5 if strict else 0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [{}, dict(registers=4, resample="bicubic-antialias"), dict(grid=0)])
def test_the_older_onnx_exporter_gives_them_at_one_size(family, tmp_path):
    model, images = VisualAD(replace(SMALL, **family)).eval(), torch.rand(1, 3, 56, 56)
    torch.onnx.export(Infer(model), (images,), tmp_path / "a.onnx", input_names=["x"], dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    as_infer(lambda x: session.run(None, {"x": x.numpy()}), model, images.shape)


# --- what is refused


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(3, 56, 56), r"\[3, 56, 56\]"),
        (torch.rand(1, 4, 56, 56), r"\[1, 4, 56, 56\]"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), "uint8"),
        (None, "NoneType"),
        (torch.rand(1, 3, 56, 60), "60; near: 56, 70"),
        (torch.rand(1, 3, 7, 56), "7; near: 14, 28"),
        (torch.rand(0, 3, 56, 56), r"\[0, 3, 56, 56\]"),
    ],
)
def test_bad_images_and_sigmas_are_named_at_the_door(model, images, message):
    for call in (model, model.infer):
        with pytest.raises(ValueError, match=message):
            call(images)
    for sigma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma"):
            model.infer(torch.rand(1, 3, 56, 56), sigma=sigma)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(backbone="clip-vit-l15"), "clip-vit-l14-336"),
        (dict(backbone=SMALL, layers=(1, 5)), r"1\.\.4"),
        (dict(backbone=SMALL, layers=(0, 4)), r"1\.\.4"),
        (dict(backbone=SMALL, image_size=60), "near: 56, 70"),
        (dict(backbone=replace(SMALL, heads=3)), "heads must divide the width"),
        (dict(backbone=replace(SMALL, heads=0)), "heads must divide the width"),
        (dict(backbone=replace(SMALL, activation="relu")), "activation"),
    ],
    ids=str,
)
def test_bad_models_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisualAD(**arguments)
