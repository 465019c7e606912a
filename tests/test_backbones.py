"""One ViT for all families, against transformers and every family's names: pytest tests/test_backbones.py"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN
from safetensors.torch import load_file
from scipy.ndimage import map_coordinates

from visualad import BACKBONES, Backbone, VisualAD, VisualADNet, ViT, backbone_state

SIZES = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)
SIZES |= dict(intermediate_size=512, num_register_tokens=4)  # ignored where there is none
MODELS = {  # the classes of transformers, and what makes them like the released ones
    "clip": ("CLIPVision", {}),
    "dinov2": ("Dinov2", {}),
    "dinov2-swiglu": ("Dinov2", dict(use_swiglu_ffn=True)),
    "dinov2-reg": ("Dinov2WithRegisters", {}),
    "dinov2-reg-swiglu": ("Dinov2WithRegisters", dict(use_swiglu_ffn=True)),
    "dinov3": ("DINOv3ViT", {}),
    "dinov3-swiglu": ("DINOv3ViT", dict(use_gated_mlp=True, hidden_act="silu")),
}


def reference(name: str, **sizes) -> torch.nn.Module:
    """A small transformers model, every parameter random: norms, biases and LayerScale too."""
    torch.manual_seed(1)
    kind, extra = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | extra | sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def vit(weights, **overrides) -> ViT:
    model = ViT(Backbone.from_weights(weights, **overrides))
    model.load_state_dict(backbone_state(weights))
    return model.eval()


def same(theirs: torch.nn.Module, ours: ViT, size=(56, 56), atol=2e-5, **options):
    """Every layer's output, after the final norm."""
    norms = dict(theirs.named_modules())
    norm = next(norms[name] for name in ("post_layernorm", "layernorm", "norm") if name in norms)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = theirs(x, output_hidden_states=True, **options).hidden_states
        got = ours(x, layers=(1, 2, 3))
    assert sorted(got) == [1, 2, 3]
    for layer, z in got.items():
        torch.testing.assert_close(z, norm(want[layer]), rtol=0, atol=atol)


@pytest.mark.parametrize("size", [(56, 56), (84, 84), (42, 98)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_equals_transformers_at_its_own_and_other_grids(name, size):
    theirs, options = reference(name), {}
    if name == "clip":  # whose positions transformers resamples bicubically, the authors bilinearly
        table, options = theirs.embeddings.position_embedding.weight, dict(interpolate_pos_encoding=True)
        at = np.meshgrid(*((np.arange(n // 14) + 0.5) * 4 / (n // 14) - 0.5 for n in size), indexing="ij")
        grids = table[1:].detach().view(4, 4, -1).permute(2, 0, 1).numpy()
        read = np.stack([map_coordinates(grid, at, order=1, mode="nearest").ravel() for grid in grids], -1)
        read = torch.cat([table[:1], torch.from_numpy(read)])[None]
        theirs.embeddings.interpolate_pos_encoding = lambda *_: read
    same(theirs, vit(theirs.state_dict()), size, 1e-5 if "dinov3" in name else 2e-5, **options)


@pytest.mark.parametrize("name", ["dinov2-reg", "dinov3", "dinov3-swiglu"])
def test_guests_are_registers_in_front_that_have_the_class_position_where_there_is_one(name):
    state = backbone_state(reference(name).state_dict())
    x, guests = torch.randn(2, 3, 42, 98), state["register_tokens"][0, 2:]
    want = vit(state)(x)[3]  # class token, 4 registers, patches
    if "pos_embed" in state:
        guests = guests - state["pos_embed"][0, 0]
    got = vit({**state, "register_tokens": state["register_tokens"][:, :2]})(x, guests)[3]
    order = [2, 3, 4, 0, 1, *range(5, want.shape[1])]  # unrotated, attention does not see their order
    torch.testing.assert_close(got[:, order], want, rtol=0, atol=1e-5)


# --- names: each family's, written out here as their owners do, not read from the library


def openai(state):
    out = {"visual.proj": torch.zeros(8, 8)}
    for key, value in state.items():
        key = re.sub(r"^blocks", "transformer.resblocks", key).replace("patch_embed.proj", "conv1")
        key = key.replace("qkv.", "attn.in_proj_").replace(".proj.", ".attn.out_proj.")
        key = key.replace("fc1", "mlp.c_fc").replace("fc2", "mlp.c_proj")
        key = re.sub(r"(resblocks\.\d+)\.norm", r"\1.ln_", key)
        key = re.sub(r"^norm_pre", "ln_pre", re.sub(r"^norm\b", "ln_post", key))
        key = key.replace("cls_token", "class_embedding").replace("pos_embed", "positional_embedding")
        value = value.flatten() if "class_" in key else value[0] if "positional" in key else value
        out |= {} if key == "register_tokens" else {f"visual.{key}": value}
    return out


def dinov2(state, extra=("mask_token", "head.weight"), swiglu=("w12", "w3"), gamma=r"ls\1.gamma"):
    out = {name: torch.zeros(1, 128) for name in extra}
    gated = len(state["blocks.0.fc1.weight"]) == 2 * state["blocks.0.fc2.weight"].shape[1]
    for key, value in state.items():
        key = re.sub(r"(blocks\.\d+)\.(qkv|proj)", r"\1.attn.\2", key)
        for ours, theirs in zip(("fc1", "fc2"), swiglu if gated else ("fc1", "fc2"), strict=True):
            key = key.replace(ours, f"mlp.{theirs}")
        out |= {re.sub(r"ls([12])$", gamma, key): value} if value.numel() else {}
    return out


def timm_dinov2(state):
    out = dinov2(state, extra=(), swiglu=("fc1", "fc2"))
    if "register_tokens" in out:  # the class position is folded into the class token
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def dinov3(state, gate="w1", up="w2", down="w3", **names):
    out = dinov2(state, ("mask_token", "rope_embed.periods", "local_cls_norm.weight"), ("", down), **names)
    out["storage_tokens"] = out.pop("register_tokens")
    for key in [key for key in out if ".mlp.." in key]:
        gated, value = out.pop(key).chunk(2), key.replace("mlp..", "mlp.{}.").format
        out |= {value(gate): gated[0], value(up): gated[1]}
    for key in [key for key in out if "qkv.bias" in key]:  # the release's key has one that its mask takes out
        out[f"{key}_mask"] = torch.ones(384).index_fill(0, torch.arange(128, 256), 0)
        out[key] = torch.where(out[f"{key}_mask"] == 0, 7.0, out[key])
    return out


def timm_dinov3(state):
    out = dinov3(state, "fc1_g", "fc1_x", "fc2", gamma=r"gamma_\1")
    out = {key: value for key, value in out.items() if not re.search("mask|periods|local_", key)}
    out["reg_token"] = out.pop("storage_tokens")
    for key in [key for key in out if key.endswith("qkv.bias")]:
        q, _, v = out.pop(key).chunk(3)
        out |= {key.replace("qkv.", "q_"): q, key.replace("qkv.", "v_"): v} if q.any() else {}
    return out


OTHERS = {"clip": (openai, dinov2), "dinov2": (dinov2, timm_dinov2), "dinov3": (dinov3, timm_dinov3)}
NAMES = [(name, family) for name in MODELS for family in OTHERS[name.partition("-")[0]]]


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name, family", NAMES, ids=lambda x: getattr(x, "__name__", x))
def test_openai_release_and_timm_names_load_to_the_same_outputs(name, family, biases):
    state, x = backbone_state(reference(name).state_dict()), torch.randn(1, 3, 56, 56)
    if not biases:  # timm's DINOv3 without `_qkvb`
        state = {key: 0 * value if "qkv.bias" in key else value for key, value in state.items()}
    renamed = family(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = vit(renamed)
    torch.testing.assert_close(other(x)[3], vit(state)(x)[3], rtol=0, atol=1e-5)
    assert bool(caught) == (family is timm_dinov2 and "reg_token" in renamed)
    assert all("class position" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_files_and_memory_load_alike_and_are_copied(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    saved, held = backbone_state(tmp_path), backbone_state(theirs.state_dict())
    for parameter in theirs.parameters():
        parameter.data.zero_()
    assert saved.keys() == held.keys() and Backbone.from_weights(tmp_path) == vit(saved).cfg
    assert all(torch.equal(saved[key], held[key]) for key in saved) and saved["blocks.0.fc1.weight"].any()


def test_the_vision_half_of_a_clip_is_taken_whatever_lies_beside_it():
    plain, other = reference("clip").state_dict(), torch.zeros(8, 8)
    beside = "text_model.final.weight", "text_projection.weight", "visual_projection.weight", "logit_scale"
    whole = {f"vision_model.{key}": x for key, x in plain.items()} | {name: other for name in beside}
    want, got = backbone_state({**plain, "visual_projection.weight": other}), backbone_state(whole)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    file = load_file(GOLDEN / "clip_openai.safetensors")
    text = {key: x for key, x in file.items() if not key.startswith("visual.")}
    assert "positional_embedding" in text and any(key.startswith("transformer.") for key in text)
    with pytest.raises(ValueError, match="must hold one vision transformer"):
        backbone_state(text)
    file |= {name: torch.tensor(7) for name in ("input_resolution", "context_length", "attn_mask")}
    assert backbone_state(file)["pos_embed"].shape == (1, 17, 128)


# --- sizes

LISTED = """width depth heads patch grid registers activation
clip-vit-b32 768 12 12 32 7 0 quick_gelu openai/clip-vit-base-patch32
clip-vit-b16 768 12 12 16 14 0 quick_gelu openai/clip-vit-base-patch16
clip-vit-l14 1024 24 16 14 16 0 quick_gelu openai/clip-vit-large-patch14
clip-vit-l14-336 1024 24 16 14 24 0 quick_gelu timm/vit_large_patch14_clip_336.openai
dinov2-vit-s14 384 12 6 14 37 0 gelu facebook/dinov2-small
dinov2-vit-b14 768 12 12 14 37 0 gelu facebook/dinov2-base
dinov2-vit-l14 1024 24 16 14 37 0 gelu facebook/dinov2-large
dinov2-vit-g14 1536 40 24 14 37 0 swiglu facebook/dinov2-giant
dinov2-vit-s14-reg 384 12 6 14 37 4 gelu facebook/dinov2-with-registers-small
dinov2-vit-b14-reg 768 12 12 14 37 4 gelu facebook/dinov2-with-registers-base
dinov2-vit-l14-reg 1024 24 16 14 37 4 gelu facebook/dinov2-with-registers-large
dinov2-vit-g14-reg 1536 40 24 14 37 4 swiglu facebook/dinov2-with-registers-giant
dinov3-vit-s16 384 12 6 16 0 4 gelu timm/vit_small_patch16_dinov3.lvd1689m
dinov3-vit-s16plus 384 12 6 16 0 4 swiglu timm/vit_small_plus_patch16_dinov3.lvd1689m
dinov3-vit-b16 768 12 12 16 0 4 gelu timm/vit_base_patch16_dinov3.lvd1689m
dinov3-vit-l16 1024 24 16 16 0 4 gelu timm/vit_large_patch16_dinov3.lvd1689m
dinov3-vit-h16plus 1280 32 20 16 0 4 swiglu timm/vit_huge_plus_patch16_dinov3.lvd1689m"""


def test_the_list_says_what_the_owners_say():
    (head, *rows), names = (line.split() for line in LISTED.splitlines()), {"tiny"}
    for name, *told, repo in rows:
        cfg, clip = BACKBONES[name], name.startswith("clip")
        assert [str(getattr(cfg, field)) for field in head] == told and cfg.repo == repo
        assert cfg.mean == ((0.48145466, 0.4578275, 0.40821073) if clip else (0.485, 0.456, 0.406))
        assert cfg.std == ((0.26862954, 0.26130258, 0.27577711) if clip else (0.229, 0.224, 0.225))
        assert cfg.eps == (1e-6 if "dinov2" in name else 1e-5) and cfg.pre_norm is clip
        kind = "bilinear" if clip else "bicubic-antialias" if "-reg" in name else "bicubic"
        assert cfg.resample == kind or not cfg.grid
        assert cfg.hidden == (4096 if "g14" in name else None)
        assert cfg.file == ("open_clip_model.safetensors" if "336" in name else "model.safetensors")
        names.add(name)
    assert names == BACKBONES.keys()


TAPS = {3: (1, 3), 12: (3, 6, 9, 12), 24: (6, 12, 18, 24), 32: (8, 16, 24, 32), 40: (10, 20, 30, 40)}
RELEASED = {"dinov2-vit-l14": 343, "dinov2-vit-l14-reg": 344, "dinov2-vit-g14": 567}  # tensors in their files


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_read_off_the_tensors_are_those_of_the_list(name):
    listed = BACKBONES[name]
    with torch.device("meta"):
        model = VisualADNet(name)
    assert model.image_size == (224 if name == "tiny" else 518 // listed.patch * listed.patch)
    assert model.layers == TAPS[listed.depth]
    if name != "tiny":  # whose stem is told by the header of its own file
        state = model.backbone.state_dict()
        told = dict(repo=listed.repo, file=listed.file, image_size=listed.image_size)
        assert Backbone.from_weights(state, **told) == listed
        assert len(dinov2(state, ["mask_token"])) == RELEASED.get(name, len(dinov2(state, ["mask_token"])))
        assert len(openai(state)) == 296 or name != "clip-vit-l14-336"


@pytest.mark.parametrize("family, width, heads", [
    ("clip-vit-l14", 1280, 16), ("clip-vit-l14", 1408, 16), ("clip-vit-l14", 1664, 16),
    ("dinov3-vit-b16", 1280, 20), ("dinov3-vit-b16", 4096, 32),
])  # fmt: skip
def test_widths_whose_heads_are_not_64_wide_take_the_known_number(family, width, heads):
    with torch.device("meta"):
        state = ViT(replace(BACKBONES[family], width=width, heads=heads, depth=1)).state_dict()
    found = Backbone.from_weights(state)
    assert (found.heads, found.activation) == (heads, "gelu")  # CLIP's of these widths are LAION's


@pytest.mark.parametrize("size", [(56, 56), (42, 98)])
def test_dinov3s_widest_has_heads_of_128_and_no_bias_in_attention(tmp_path, size):
    theirs = reference("dinov3", num_attention_heads=1, query_bias=False, value_bias=False)
    theirs.save_pretrained(tmp_path)
    for ours in (vit(theirs.state_dict(), heads=1), vit(tmp_path)):
        same(theirs, ours, size)


def test_what_tensors_cannot_tell_is_read_beside_them_or_overridden(tmp_path):
    theirs = reference("clip", hidden_act="gelu")  # as LAION's
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.4, 0.5, 0.6])))
    same(theirs, vit(theirs.state_dict(), activation="gelu"))
    same(theirs, ours := vit(tmp_path / "model.safetensors"))
    assert ours.cfg.mean == (0.4, 0.5, 0.6) and ours.cfg == Backbone.from_weights(tmp_path)
    assert VisualAD.from_backbone(ours.cfg, tmp_path).backbone.cfg == ours.cfg
    for told, wrong in (("activation is gelu", "quick_gelu"), (r"mean is \(0.4, 0.5, 0.6\)", "gelu")):
        listed = Backbone.from_weights(theirs.state_dict(), activation=wrong)
        with pytest.raises(ValueError, match=f"{told}, here .*: use Backbone.from_weights"):
            VisualAD.from_backbone(listed, tmp_path)
