"""Checkpoints: strict, bit-exact, whole or not at all: pytest tests/test_loading.py"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import CLIP, OFFICIAL, SMALL, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import visualad
from visualad import Backbone, VisualAD, backbone_state

FAMILIES = {
    "dinov2": SMALL,
    "tiny": Backbone(64, 2, 1, 8, 4, stem=(8, 16), image_size=32, sigma=1.7),
    "clip": Backbone(64, 2, 1, 14, 4, image_size=56, **visualad.CLIP),
    "dinov3": Backbone(64, 2, 1, image_size=64, **visualad.DINOV3),
    "dinov3-swiglu": Backbone(64, 2, 1, image_size=64, **visualad.DINOV3, **visualad.GATED),
}


def theirs(folder, **change) -> VisualAD:
    """The authors' checkpoint with a change."""
    torch.save(torch.load(OFFICIAL, weights_only=True) | change, folder / "theirs.pth")
    return VisualAD.from_pretrained(folder / "theirs.pth", backbone_weights=CLIP)


# --- backbones

BLOCK = "visual.transformer.resblocks"


@pytest.mark.parametrize("key, value, told", [
    ("visual.surprise", torch.zeros(3), "surprise"),
    (f"{BLOCK}.2.ln_1.bias", None, r"blocks\.2\.norm1\.bias"),
    (f"{BLOCK}.0.mlp.c_fc.bias", torch.zeros(7), r"blocks\.0\.fc1\.bias.*\[7\].*\[512\]"),
    (f"{BLOCK}.0.self_attn.q_proj.bias", torch.zeros(128), r"blocks\.0\.qkv\.bias"),
    ("teacher.cls_token", torch.zeros(1, 1, 128), "several, after .'teacher.', 'visual.'."),
    ("visual.conv1.weight", None, "not a whole vision transformer.*patch_embed.proj.weight"),
    ("visual.class_embedding", None, "must hold one vision transformer"),
])  # fmt: skip
def test_unknown_missing_and_misshapen_tensors_and_two_transformers_are_named(listed, key, value, told):
    clip = {name: x for name, x in load_file(CLIP).items() if name != key}
    clip |= {} if value is None else {key: value}
    with pytest.raises(ValueError, match=f"(?s){told}"):
        VisualAD.from_backbone(listed, clip)


@pytest.mark.parametrize("prefix, wrap", [
    *((prefix, dict) for prefix in ("", "backbone.", "module.", "_orig_mod.", "teacher.backbone.")),
    ("", lambda x: {"model": x, "optimizer": {"state": {0: torch.zeros(3)}}}),
    ("module.visual.trunk.", lambda x: {"epoch": 1, "state_dict": x | {"logit_scale": torch.ones(1)}}),
    ("student.", lambda x: {"all": [x, {"args": None}]}),
])  # fmt: skip
def test_whatever_stands_before_the_names_of_one_transformer_is_cut_off(prefix, wrap, tmp_path):
    plain = visualad.ViT(SMALL).state_dict()
    state = wrap({prefix + key: value for key, value in plain.items()})
    torch.save(state, tmp_path / "a.pth")
    for weights in (state, tmp_path / "a.pth"):
        assert same(backbone_state(weights), plain) and Backbone.from_weights(weights).depth == 4


def test_shards_load_by_their_folder_and_index_and_one_alone_is_an_error(tmp_path):
    sizes = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, num_hidden_layers=2)
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    shards, want = sorted(tmp_path.glob("model-*.safetensors")), backbone_state(model.state_dict())
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", str(tmp_path)):
        assert same(backbone_state(path), want) and Backbone.from_weights(path).depth == 2
    for shard in shards:
        with pytest.raises(ValueError, match=f"{shard.name} .*vision transformer of a known family"):
            backbone_state(shard)
    assert len(shards) > 2


def test_pickles_run_no_code_and_damaged_files_load_as_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"anomaly_token": Evil()}, tmp_path / "evil.pth")
    for name, start in (("a.safetensors", 0), ("a.pth", 0), ("a.bin", 0), ("cut.safetensors", 100_000)):
        (tmp_path / name).write_bytes(CLIP.read_bytes()[:start] or b"not a checkpoint at all")
    for path in tmp_path.iterdir():
        for call in (VisualAD.from_pretrained, backbone_state):
            with pytest.raises(ValueError, match=f"{path.name} cannot be read as weights"):
                call(path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        backbone_state(tmp_path / "nowhere.safetensors")
    torch.save(load_file(CLIP), tmp_path / "pytorch_model.bin")
    assert same(backbone_state(tmp_path), backbone_state(CLIP))  # a folder as Hugging Face lays it out


def test_training_starts_with_a_random_part_and_the_backbones_norm(listed):
    model = VisualAD.from_backbone("listed", CLIP, layers=(4,), anchors=3, image_size=70)
    model.norm.weight.data += 1  # not the same memory
    assert torch.equal(model.backbone.norm.weight, load_file(CLIP)["visual.ln_post.weight"].float())
    assert torch.equal(model.norm.weight, model.backbone.norm.weight + 1)
    assert (model.layers, model.anchors, model.image_size) == ((4,), 3, 70) and model.tokens.std() < 0.02
    tiny = VisualAD.from_backbone("tiny")
    bundled = VisualAD.from_pretrained("tiny")
    assert same(tiny.backbone.state_dict(), bundled.backbone.state_dict()) and tiny.threshold is None
    assert not torch.equal(tiny.tokens, bundled.tokens)
    with pytest.raises(ValueError, match="hosted nowhere: pass backbone_weights"):
        VisualAD.from_backbone(SMALL)
    for load in (VisualAD.from_backbone, VisualAD.from_pretrained):
        with pytest.raises(TypeError, match="torch_dtype"):  # transformers' word for it
            load("tiny", torch_dtype=torch.float16)


# --- the authors' checkpoints


def test_sizes_come_from_the_checkpoint_cut_to_whole_patches_metadata_is_ignored(official, tmp_path):
    assert official.layers == (2, 4) and official.image_size == 84 and official.anchors == 4
    checkpoint = torch.load(OFFICIAL, weights_only=True)
    flat = checkpoint["cross_attn"]["layer_attentions.layer_4.pos_encoding"][0]
    assert torch.equal(official.sca["4"].pos, flat[:36].view(6, 6, 128)) and not official.training
    frozen = {key for key, parameter in official.named_parameters() if not parameter.requires_grad}
    assert frozen == {key for key in official.state_dict() if key.startswith("backbone.")}
    for change in (
        dict(note="hello", loss_history=[1.0], args={"lr": 0.1, 6: [2.0, {"x": None}]}),
        dict(image_size=84 + 13),  # as 518 px on ViT-B/16: their convolution leaves the last 6 px out
        dict(ln_post_weight=None, ln_post_bias=None),
    ):
        assert same(theirs(tmp_path, **change), official)
    with pytest.raises(ValueError, match="norm.weight"):
        VisualAD.from_pretrained(tmp_path / "theirs.pth", backbone_weights=CLIP, final_norm="checkpoint")


@pytest.mark.parametrize("change, told", [
    (dict(surprise=torch.zeros(2)), "surprise"),
    (dict(surprise=[{3: torch.zeros(2)}]), "surprise"),
    (dict(features_list=[2]), "sca.4.anchors"),
    (dict(cross_attn_config={"num_anchors": 5}), "sca.2.anchors"),
    (dict(backbone="ViT-L/14@336px"), "backbone.blocks.4"),
    (dict(image_size=14 * 40), "1536"),
])  # fmt: skip
def test_what_does_not_fit_together_is_an_error_that_names_it(tmp_path, change, told):
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){told}"):
        theirs(tmp_path, **change)


def test_what_is_no_model_is_explained(tmp_path):
    torch.save(load_file(CLIP) | {"config": {"lr": 0.1}}, tmp_path / "clip.pth")
    for path in (CLIP, tmp_path / "clip.pth"):
        with pytest.raises(ValueError, match="is no VisualAD model; .*backbone_weights"):
            VisualAD.from_pretrained(path, backbone_weights=CLIP)
    with pytest.raises(ValueError, match="ViT-tiny-golden.*backbone_weights"):
        VisualAD.from_pretrained(OFFICIAL)
    for source in ("no-such-model", "no/such/model/here", "gone.safetensors", "a/gone.pth"):
        with pytest.raises(FileNotFoundError, match=f"{source}.*clip-vit-l14-336-visa"):
            VisualAD.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match="could not get ~/x: .*; give a local path"):
        VisualAD.from_pretrained("~/x")
    with pytest.raises(ValueError, match="final_norm"):
        VisualAD.from_pretrained("tiny", final_norm="both")


# --- ours


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_a_step_is_saved_and_comes_back_bit_for_bit(family, tmp_path):
    torch.manual_seed(0)
    model = VisualAD(FAMILIES[family]).train()
    images = torch.rand(2, 3, model.image_size, model.image_size)
    before = model.infer(images)[1]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    model(images).score.sum().backward()
    optimizer.step()
    model.threshold = 0.1
    model.save_pretrained(tmp_path)
    loaded = VisualAD.from_pretrained(tmp_path)
    assert same(model, loaded) and loaded.backbone.cfg == model.backbone.cfg and not loaded.training
    assert loaded.threshold == model.threshold
    for a, b in zip(model.infer(images), loaded.infer(images), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(loaded.infer(images)[1], before)
    fresh = VisualAD(FAMILIES[family])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.infer(images)[1], loaded.infer(images)[1])  # sigma is the backbone's
    plain = VisualAD.from_pretrained(tmp_path, final_norm="backbone")
    assert plain.threshold is None  # it was for other scores
    assert torch.equal(plain.norm.weight, model.backbone.norm.weight)


def test_a_hosted_backbone_is_saved_only_if_it_was_tuned(listed, monkeypatch, tmp_path):
    asked, images = [], torch.rand(2, 3, 84, 84)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **_: asked.append(args) or CLIP)
    model = VisualAD.from_backbone("listed", CLIP)
    model.save_pretrained(tmp_path / "a")
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == model.learned().keys()
    assert same(model, VisualAD.from_pretrained(tmp_path / "a"))
    assert same(model, VisualAD.from_pretrained(tmp_path / "a", backbone_weights=load_file(CLIP)))
    assert asked == [("org/clip", "open_clip_model.safetensors")]
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images).score.sum().backward()
    optimizer.step()
    model.calibrate(images)
    model.save_pretrained(tmp_path / "b")
    for weights in (None, CLIP):
        again = VisualAD.from_pretrained(tmp_path / "b", backbone_weights=weights)
        assert same(model, again) and again.threshold == model.threshold
        again.save_pretrained(tmp_path / "c")
        assert same(model, VisualAD.from_pretrained(tmp_path / "c"))
    assert len(asked) == 1


def test_the_lone_file_is_complete_and_config_json_a_copy(model, tmp_path):
    model.save_pretrained(str(tmp_path))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt" and header["config"] == (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text("{}")
    file = (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    assert same(model, VisualAD.from_pretrained(file)) and same(model, VisualAD.from_pretrained(str(file)))
    half = {key: value.half() for key, value in model.state_dict().items()}
    save_file(half, file, header)
    assert VisualAD.from_pretrained(file).tokens.dtype == torch.float32
    del half["sca.2.alpha"]
    save_file(half, file, header)
    with pytest.raises(ValueError, match="sca.2.alpha"):
        VisualAD.from_pretrained(file)


def test_a_full_disk_loses_nothing_and_the_card_is_kept_without_new_notes(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, notes="Trained on {braces}.")
    card = (tmp_path / "README.md").read_text()
    assert f'VisualAD.from_pretrained("{tmp_path}")' in card and "Trained on {braces}." in card
    assert "license: mit" in card and "pipeline_tag: image-segmentation" in card
    model.save_pretrained(tmp_path, notes="Other.")
    assert (tmp_path / "README.md").read_text() == card.replace("Trained on {braces}.", "Other.")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert before[tmp_path / "README.md"] == b"mine"
    model.tokens.data += 1
    room = iter([None])  # config.json still fits, and is the same
    whole = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: next(room) or whole(path, data))
    with pytest.raises(StopIteration):
        model.save_pretrained(tmp_path)
    assert before == {path: path.read_bytes() for path in before}


def test_dtype_casts_the_frozen_backbone_only(model, tmp_path):
    model.save_pretrained(tmp_path)
    half, images = VisualAD.from_pretrained(tmp_path, dtype=torch.bfloat16), torch.rand(2, 3, 56, 56)
    for name, x in half.named_parameters():
        assert x.dtype == (torch.bfloat16 if name.startswith("backbone.") else torch.float32), name
    maps, score = half.infer(images)
    assert maps.dtype == score.dtype == half(images).map.dtype == torch.float32
    torch.testing.assert_close(maps, model.infer(images)[0], rtol=0, atol=0.05)


def test_the_device_is_the_one_asked_for_whatever_the_default_and_no_random_number_is_drawn(model, tmp_path):
    model.save_pretrained(tmp_path)
    image, state = torch.rand(3, 40, 50), torch.get_rng_state()
    want = VisualAD.from_pretrained(tmp_path).predict(image).score
    with torch.device("meta"):
        found = VisualAD.from_pretrained(tmp_path, device="cpu")
        assert found.predict(image).score == want == found.predict(image.permute(1, 2, 0).numpy()).score
        assert VisualAD.from_pretrained(tmp_path).tokens.is_meta
    assert torch.equal(torch.get_rng_state(), state)
