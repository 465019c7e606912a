"""One ViT for all families, against transformers' models and every family's names.

pytest tests/test_backbones.py
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SMALL
from safetensors.torch import load_file, save_file
from scipy.ndimage import map_coordinates
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from visualad import BACKBONES, Backbone, VisualAD, ViT, backbone_state

SIZES = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)
MODELS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, dict(intermediate_size=512)),
    "dinov2": (Dinov2Model, Dinov2Config, {}),
    "dinov2-swiglu": (Dinov2Model, Dinov2Config, dict(use_swiglu_ffn=True)),
    "dinov2-reg": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {}),
    "dinov2-reg-swiglu": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, dict(use_swiglu_ffn=True)),
}


def reference(name: str, **sizes) -> torch.nn.Module:
    """A small transformers model, every parameter random: norms, biases and LayerScale too."""
    model, config, extra = MODELS[name]
    torch.manual_seed(1)
    model = model(config(**{**SIZES, **extra, **sizes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def vit(state, **overrides) -> ViT:
    model = ViT(Backbone.from_weights(state, **overrides))
    model.load_state_dict(backbone_state(state))
    return model.eval()


def final_norm(model: torch.nn.Module) -> torch.nn.Module:
    return next(
        m for n, m in model.named_modules() if n.rpartition(".")[2] in ("post_layernorm", "layernorm")
    )


# transformers' CLIP has no non-square positions to compare with: the next test has
CASES = [(name, size) for name in MODELS for size in [(56, 56), (84, 84), (42, 98)]]


@pytest.mark.parametrize("name, size", [case for case in CASES if case != ("clip", (42, 98))], ids=str)
def test_every_layer_equals_transformers_at_its_own_and_other_grids(name, size):
    theirs = reference(name)
    ours = vit(theirs.state_dict())
    x = torch.randn(2, 3, *size)
    if name == "clip" and size != (56, 56):
        # transformers resamples CLIP's positions bicubically, the authors bilinearly: give it theirs
        larger = reference(name, image_size=size[0])
        state, grid = theirs.state_dict(), size[0] // 14
        key = next(k for k in state if k.endswith("position_embedding.weight"))
        at = (np.arange(grid) + 0.5) * 4 / grid - 0.5
        at = np.meshgrid(at, at, indexing="ij")
        table = state[key][1:].view(4, 4, -1).numpy()
        table = np.stack(
            [map_coordinates(t, at, order=1, mode="nearest") for t in np.moveaxis(table, -1, 0)], -1
        )
        state[key] = torch.cat([state[key][:1], torch.from_numpy(table).view(grid * grid, -1)])
        larger.load_state_dict(
            {k: v for k, v in state.items() if not k.endswith("position_ids")}, strict=False
        )
        theirs = larger
    with torch.no_grad():
        want = theirs(x, output_hidden_states=True).hidden_states
        got = ours(x, layers=(1, 2, 3))
    assert sorted(got) == [1, 2, 3]
    for layer, z in got.items():
        torch.testing.assert_close(z, final_norm(theirs)(want[layer]), rtol=0, atol=2e-5)


def test_clip_at_a_non_square_grid_is_clip_with_that_position_table():
    state = backbone_state(reference("clip").state_dict())
    ours = vit(state)
    table = state["pos_embed"][0, 1:].view(4, 4, -1).numpy()
    at = np.meshgrid((np.arange(3) + 0.5) * 4 / 3 - 0.5, (np.arange(7) + 0.5) * 4 / 7 - 0.5, indexing="ij")
    table = np.stack([map_coordinates(t, at, order=1, mode="nearest") for t in np.moveaxis(table, -1, 0)], -1)
    x = torch.randn(1, 3, 42, 98)
    seen = []
    ours.norm_pre.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    ours(x)
    patches = torch.nn.functional.conv2d(x, state["patch_embed.weight"], stride=14).flatten(2).mT
    torch.testing.assert_close(
        seen[0][:, 1:], patches + torch.from_numpy(table).view(1, 21, -1), rtol=0, atol=1e-5
    )


def test_layers_count_from_one_and_the_last_always_comes():
    model = vit(reference("dinov2").state_dict())
    x = torch.randn(1, 3, 56, 56)
    assert sorted(model(x, layers=(1,))) == [1, 3] and sorted(model(x)) == [1, 2, 3]
    for layers in ((0,), (4,), ()):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            model(x, layers=layers)


def test_guests_ride_in_front_on_the_class_position_and_only_attention_sees_them():
    model = vit(reference("dinov2-reg").state_dict())
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x, guests = torch.randn(2, 3, 56, 56), torch.randn(2, 128)
    out = model(x, guests)
    assert out[3].shape == (2, 2 + 1 + 4 + 16, 128)
    torch.testing.assert_close(seen[0][1, :2], guests + model.pos_embed[0, 0])
    model(x)
    torch.testing.assert_close(seen[1], seen[0][:, 2:])  # registers carry no position with or without guests
    torch.testing.assert_close(seen[1][0, 1:5], model.register_tokens[0])


# --- names: each family's, written out here as their owners do, not read from the library


def openai(state):
    out = {}
    for key, value in state.items():
        key = re.sub(r"^blocks", "transformer.resblocks", key).replace("qkv.", "attn.in_proj_")
        key = key.replace(".proj.", ".attn.out_proj.").replace("fc1", "mlp.c_fc").replace("fc2", "mlp.c_proj")
        key = re.sub(r"(resblocks\.\d+)\.norm", r"\1.ln_", key)
        key = re.sub(r"^norm_pre", "ln_pre", re.sub(r"^norm\b", "ln_post", key)).replace(
            "patch_embed", "conv1"
        )
        key = key.replace("cls_token", "class_embedding").replace("pos_embed", "positional_embedding")
        if key != "register_tokens":
            out["visual." + key] = (
                value.flatten() if "class_" in key else value[0] if "positional" in key else value
            )
    return {**out, "visual.proj": torch.zeros(8, 8)}


def dinov2(state, timm=False):
    out = {} if timm else {"mask_token": torch.zeros(1, 128)}
    for key, value in state.items():
        key = key.replace("patch_embed.", "patch_embed.proj.").replace(".qkv", ".attn.qkv")
        key = re.sub(r"(blocks\.\d+)\.proj", r"\1.attn.proj", key)
        swiglu = ("fc1", "fc2") if timm else ("w12", "w3")
        doubled = state["blocks.0.fc1.weight"].shape[0] == 2 * state["blocks.0.fc2.weight"].shape[1]
        names = swiglu if doubled else ("fc1", "fc2")
        key = key.replace("fc1", f"mlp.{names[0]}").replace("fc2", f"mlp.{names[1]}")
        key = re.sub(r"(ls[12])$", r"\1.gamma", key)
        if key != "register_tokens" or value.numel():
            out[key] = value
    return out


def timm_dinov2(state):
    out = dinov2(state, timm=True)
    if "register_tokens" in out:  # the class position is folded into the class token
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def timm_clip(state):
    return {**dinov2(state, timm=True), "head.weight": torch.zeros(8, 8), "head.bias": torch.zeros(8)}


FAMILIES = {"clip": (openai, timm_clip), "dinov2": (dinov2, timm_dinov2)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("family", [0, 1])
def test_openai_release_and_timm_names_load_to_the_same_outputs(name, family):
    state = backbone_state(reference(name).state_dict())
    ours, x = vit(state), torch.randn(1, 3, 56, 56)
    renamed = FAMILIES[name.partition("-")[0]][family](state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = vit(renamed)
    torch.testing.assert_close(other(x)[3], ours(x)[3], rtol=0, atol=1e-5)
    assert bool(caught) == ("reg_token" in renamed) and all(
        "class position" in str(w.message) for w in caught
    )


@pytest.mark.parametrize("name", MODELS)
def test_transformers_files_and_memory_load_alike(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    saved, held = backbone_state(tmp_path), backbone_state(theirs.state_dict())
    assert saved.keys() == held.keys()
    for key in saved:
        torch.testing.assert_close(saved[key], held[key], rtol=0, atol=0)


def test_clip_with_projection_text_tower_or_prefix_loads_its_vision_half():
    config = CLIPVisionConfig(**SIZES, intermediate_size=512)
    theirs = CLIPVisionModelWithProjection(config).state_dict()
    plain = {re.sub(r"^vision_model\.", "", k): v for k, v in theirs.items()}
    prefixed = {k if k.startswith("visual_projection") else f"vision_model.{k}": v for k, v in plain.items()}
    extra = {
        "text_model.embeddings.position_ids": torch.arange(8)[None],
        "text_projection.weight": torch.zeros(8, 8),
        "logit_scale": torch.tensor(1.0),
        "logit_bias": torch.tensor(1.0),
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    a, b = backbone_state(plain), backbone_state({**prefixed, **extra})
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_text_tower_of_an_openai_file_is_not_taken_for_the_vision_tower():
    file = load_file(GOLDEN / "clip_openai.safetensors")
    text = {k: v for k, v in file.items() if not k.startswith("visual.")}
    assert "positional_embedding" in text and any(k.startswith("transformer.") for k in text)
    with pytest.raises(ValueError, match="no vision transformer"):
        backbone_state(text)
    archive = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # OpenAI's, open_clip's
    file |= {name: torch.tensor(7) for name in archive}
    assert backbone_state(file)["pos_embed"].shape == (1, 17, 128)


@pytest.mark.parametrize(
    "name, count",
    [
        ("clip-vit-l14-336", 296),
        ("dinov2-vit-l14", 343),
        ("dinov2-vit-l14-reg", 344),
        ("dinov2-vit-g14", 567),
    ],
)
def test_listed_backbones_have_the_tensors_of_the_released_files(name, count):
    with torch.device("meta"):
        state = ViT(BACKBONES[name]).state_dict()
    assert len((openai if name.startswith("clip") else dinov2)(state)) == count


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_read_off_the_tensors_are_those_of_the_list(name):
    listed = BACKBONES[name]
    with torch.device("meta"):
        state = ViT(listed).state_dict()
    found = Backbone.from_weights(state, repo=listed.repo, file=listed.file, image_size=listed.image_size)
    assert replace(found, layers=listed.layers) == listed
    assert found.layers == listed.layers or name == "tiny"


def test_the_list_says_what_the_owners_say():
    def sizes(name):
        cfg = BACKBONES[name]
        return cfg.width, cfg.depth, cfg.heads, cfg.patch, cfg.grid, cfg.registers

    assert [sizes(f"clip-vit-{n}") for n in ("b32", "b16", "l14", "l14-336")] == [
        (768, 12, 12, 32, 7, 0), (768, 12, 12, 16, 14, 0),
        (1024, 24, 16, 14, 16, 0), (1024, 24, 16, 14, 24, 0),
    ]  # fmt: skip
    dino = [("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16), ("g", 1536, 40, 24)]
    for letter, width, depth, heads in dino:
        assert sizes(f"dinov2-vit-{letter}14") == (width, depth, heads, 14, 37, 0)
        assert sizes(f"dinov2-vit-{letter}14-reg") == (width, depth, heads, 14, 37, 4)
    assert BACKBONES["dinov2-vit-g14"].hidden == 4096 and BACKBONES["dinov2-vit-g14"].activation == "swiglu"
    for name, cfg in BACKBONES.items():
        clip = name.startswith("clip")
        assert cfg.mean == ((0.48145466, 0.4578275, 0.40821073) if clip else (0.485, 0.456, 0.406))
        assert cfg.std == ((0.26862954, 0.26130258, 0.27577711) if clip else (0.229, 0.224, 0.225))
        kind = "bilinear" if clip else "bicubic-antialias" if cfg.registers else "bicubic"
        assert (cfg.eps, cfg.pre_norm, cfg.resample) == (1e-5 if clip else 1e-6, clip, kind)
    repos = {name: cfg.repo for name, cfg in BACKBONES.items() if cfg.repo}
    assert repos == {
        "clip-vit-b32": "openai/clip-vit-base-patch32", "clip-vit-b16": "openai/clip-vit-base-patch16",
        "clip-vit-l14": "openai/clip-vit-large-patch14",
        "clip-vit-l14-336": "timm/vit_large_patch14_clip_336.openai",
        **{f"dinov2-vit-{s[0]}14": f"facebook/dinov2-{s}" for s in ("small", "base", "large", "giant")},
        **{f"dinov2-vit-{s[0]}14-reg": f"facebook/dinov2-with-registers-{s}"
           for s in ("small", "base", "large", "giant")},
    }  # fmt: skip
    assert {cfg.file for cfg in BACKBONES.values()} == {"model.safetensors", "open_clip_model.safetensors"}


def test_what_tensors_cannot_tell_can_be_overridden():
    cfg = Backbone.from_weights(
        backbone_state(reference("clip").state_dict()), activation="gelu", layers=(2, 3)
    )
    assert cfg.activation == "gelu" and cfg.layers == (2, 3) and cfg.eps == 1e-5 and cfg.heads == 2


@pytest.mark.parametrize("field", [dict(heads=3), dict(heads=0), dict(activation="relu")])
def test_a_backbone_that_cannot_be_built_is_refused(field):
    with pytest.raises(ValueError, match="heads must divide the width"):
        VisualAD(replace(BACKBONES["tiny"], **field))


def test_default_taps_are_the_quarters_of_the_depth():
    taps = {name: BACKBONES[name].layers for name in BACKBONES}
    assert taps["clip-vit-l14-336"] == (6, 12, 18, 24) and taps["dinov2-vit-b14"] == (3, 6, 9, 12)
    assert taps["dinov2-vit-g14-reg"] == (10, 20, 30, 40)
    assert VisualAD("clip-vit-b32").image_size == 512 and SMALL.layers == (2, 4)


def test_a_given_state_dict_is_copied_not_shared():
    theirs = reference("dinov2")
    state = backbone_state(theirs.state_dict())
    for parameter in theirs.parameters():
        parameter.data.zero_()
    assert state["blocks.0.qkv.weight"].abs().sum() > 0 and state["blocks.0.fc1.weight"].abs().sum() > 0


@pytest.mark.parametrize("stem, patch", [((8,), 4), ((8, 16), 8), ((8, *[16] * 11, 24, 24), 8)])
def test_a_stem_halves_the_image_where_it_widens_and_is_read_back_from_its_tensors(stem, patch, tmp_path):
    cfg = Backbone(64, 2, 1, patch, 3, stem=stem, layer_scale=False, layers=(1, 2), image_size=3 * patch)
    vit = ViT(cfg)
    side = torch.zeros(1, 3, 24, 24)
    assert vit.stem(side).shape[-1] == 24 // 2 ** len(set(stem))
    assert vit(side)[2].shape[1] == 1 + (24 // patch) ** 2
    save_file(vit.state_dict(), tmp_path / "stem.safetensors")  # which sorts stem.12 before stem.3
    found = Backbone.from_weights(load_file(tmp_path / "stem.safetensors"))
    assert (found.stem, found.patch) == (stem, patch)
