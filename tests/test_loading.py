"""Checkpoints: strict, bit-exact, whole or not at all: pytest tests/test_loading.py"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from conftest import GOLDEN, SMALL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import visualad
from visualad import BACKBONES, Backbone, VisualAD, backbone_state

CLIP, OFFICIAL = GOLDEN / "clip_openai.safetensors", GOLDEN / "visualad_official.pth"


@pytest.fixture
def clip() -> dict[str, torch.Tensor]:
    return load_file(CLIP)


@pytest.fixture
def checkpoint() -> dict:
    return torch.load(OFFICIAL, weights_only=True)


def save_checkpoint(checkpoint, folder):
    torch.save(checkpoint, folder / "theirs.pth")
    return folder / "theirs.pth"


def same(a: VisualAD, b: VisualAD) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# --- backbones


def test_unknown_missing_and_misshapen_tensors_are_named(clip, official):
    with pytest.raises(ValueError, match="visual.surprise"):
        official.load_backbone({**clip, "visual.surprise": torch.zeros(3)})
    short = {k: v for k, v in clip.items() if "resblocks.2.ln_1" not in k}
    with pytest.raises(ValueError, match=r"2 missing: blocks\.2\.norm1"):
        official.load_backbone(short)
    name = "visual.transformer.resblocks.0.mlp.c_fc.bias"
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1\.bias \[7\], wanted \[512\]"):
        official.load_backbone({**clip, name: torch.zeros(7)})
    with pytest.raises(ValueError, match="twice"):
        official.load_backbone({**clip, "cls_token": torch.zeros(1, 1, 128)})
    parts = {f"encoder.layers.0.self_attn.{x}_proj.bias": torch.zeros(128) for x in "qk"}
    with pytest.raises(ValueError, match=r"unknown: blocks\.0\.qkv\.q\.bias"):
        official.load_backbone({**{k: v for k, v in clip.items() if "0.attn.in_proj_bias" not in k}, **parts})


def test_a_refused_backbone_leaves_the_model_as_it_was(clip, official):
    before = {k: v.clone() for k, v in official.state_dict().items()}
    clip["visual.ln_post.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="norm.bias"):
        official.load_backbone({key: value + 1 for key, value in clip.items()})
    assert all(torch.equal(v, before[k]) for k, v in official.state_dict().items())


def test_pickles_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"anomaly_token": Evil()}, tmp_path / "evil.pth")
    for call in (VisualAD.from_pretrained, backbone_state):
        with pytest.raises(ValueError, match="evil.pth"):
            call(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()


def test_a_torchscript_archive_is_refused_with_the_repo_to_take(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-L-14.pt")
    with pytest.raises(ValueError, match="timm/vit_large_patch14_clip_336.openai"):
        backbone_state(tmp_path / "ViT-L-14.pt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=name):
        backbone_state(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        backbone_state(tmp_path / "nowhere.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth"):
        backbone_state(tmp_path / "list.pth")


def test_a_folder_as_hugging_face_lays_it_out_is_a_backbone(tmp_path, clip):
    torch.save(clip, tmp_path / "pytorch_model.bin")
    assert backbone_state(tmp_path).keys() == backbone_state(CLIP).keys()
    with pytest.raises(FileNotFoundError):
        backbone_state(tmp_path / "..")


def test_the_norm_follows_the_backbone_until_it_is_trained_or_loaded(clip):
    cfg = Backbone.from_weights(clip)
    model = VisualAD.from_backbone(cfg, CLIP, layers=(2, 4), image_size=84)
    assert torch.equal(model.norm.weight, clip["visual.ln_post.weight"].float())
    assert model.tokens.std() < 0.02 and model.layers == (2, 4) and model.image_size == 84
    other = {**clip, "visual.ln_post.weight": clip["visual.ln_post.weight"] + 1}
    model.load_backbone(other)
    assert torch.equal(model.norm.weight, other["visual.ln_post.weight"].float())
    model.norm.weight.data[0] += 1e-6  # trained
    model.load_backbone(clip)
    assert torch.equal(model.backbone.norm.weight, clip["visual.ln_post.weight"].float())
    assert not torch.equal(model.norm.weight, model.backbone.norm.weight)
    loaded = VisualAD.from_pretrained(OFFICIAL, backbone_weights=CLIP, final_norm="checkpoint")
    trained = loaded.norm.weight.clone()
    loaded.backbone.norm.load_state_dict(loaded.norm.state_dict())  # as if training had not moved it
    assert torch.equal(loaded.load_backbone(other).norm.weight, trained)


def test_a_threshold_goes_with_the_weights_that_it_was_made_on(clip):
    model = VisualAD.from_pretrained(OFFICIAL, backbone_weights=CLIP)
    model.threshold, model.display_high = dict(value=0.1, size=[84, 84], sigma=4.0), 1.0
    model.load_backbone(clip)
    assert model.threshold and model.display_high == 1.0
    model.load_backbone({**clip, "visual.ln_post.weight": clip["visual.ln_post.weight"] + 1})
    assert model.threshold is None and model.display_high is None


def test_a_backbone_that_is_hosted_nowhere_needs_weights():
    with pytest.raises(ValueError, match="backbone_weights"):
        VisualAD.from_backbone(SMALL)
    tiny = VisualAD.from_backbone("tiny")
    bundled = VisualAD.from_pretrained("tiny")
    assert torch.equal(tiny.backbone.blocks[0].qkv.weight, bundled.backbone.blocks[0].qkv.weight)
    assert not torch.equal(tiny.tokens, bundled.tokens) and tiny.threshold is None


# --- the authors' checkpoints


def test_layers_size_and_anchors_come_from_the_checkpoint(official):
    assert official.layers == (2, 4) and official.image_size == 84 and official.anchors == 4
    assert official.sca["2"].pos.shape == (6, 6, 128) and not official.training
    assert not any(p.requires_grad for p in official.backbone.parameters())
    assert all(p.requires_grad for k, p in official.named_parameters() if not k.startswith("backbone."))


def test_the_position_tables_rows_are_read_in_raster_order(official, checkpoint):
    flat = checkpoint["cross_attn"]["layer_attentions.layer_4.pos_encoding"][0]
    assert torch.equal(official.sca["4"].pos[2, 5], flat[2 * 6 + 5])


def test_a_training_size_that_is_no_multiple_of_the_patch_is_rounded_down(official, checkpoint, tmp_path):
    # as 518 px on ViT-B/16, where their convolution leaves the last 6 px out
    path = save_checkpoint({**checkpoint, "image_size": 84 + 13}, tmp_path)
    model = VisualAD.from_pretrained(path, backbone_weights=CLIP)
    assert model.image_size == 84
    assert torch.equal(model.sca["2"].pos, official.sca["2"].pos)


def test_unknown_metadata_is_ignored_and_unknown_tensors_are_not(checkpoint, tmp_path):
    path = save_checkpoint(
        {**checkpoint, "note": "hello", "loss_history": [1.0], "args": {"lr": 0.1}}, tmp_path
    )
    VisualAD.from_pretrained(path, backbone_weights=CLIP)
    path = save_checkpoint({**checkpoint, "meta": {6: 1.0, 12: [2.0, {"x": None}]}}, tmp_path)
    VisualAD.from_pretrained(path, backbone_weights=CLIP)
    for extra in (torch.zeros(2), [torch.zeros(2)], {3: torch.zeros(2)}):
        path = save_checkpoint({**checkpoint, "surprise": extra}, tmp_path)
        with pytest.raises(ValueError, match="surprise"):
            VisualAD.from_pretrained(path, backbone_weights=CLIP)
    del checkpoint["cross_attn"]["layer_attentions.layer_2.res_scale"]
    path = save_checkpoint(checkpoint, tmp_path)
    with pytest.raises(ValueError, match=r"missing: sca\.2\.alpha"):
        VisualAD.from_pretrained(path, backbone_weights=CLIP)


def test_a_checkpoint_without_a_trained_norm_says_so_only_when_asked(checkpoint, tmp_path):
    path = save_checkpoint({**checkpoint, "ln_post_weight": None, "ln_post_bias": None}, tmp_path)
    VisualAD.from_pretrained(path, backbone_weights=CLIP)
    with pytest.raises(ValueError, match=r"missing: norm\.weight"):
        VisualAD.from_pretrained(path, backbone_weights=CLIP, final_norm="checkpoint")
    with pytest.raises(ValueError, match="final_norm"):
        VisualAD.from_pretrained(path, backbone_weights=CLIP, final_norm="both")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_size=14 * 40), "1536 positions, wanted 40 x 40"),
        (dict(features_list=[2]), "unknown"),
        (dict(features_list=None), "lacks features_list"),
        (dict(cross_attn_config={"num_anchors": 5}), "another shape"),
        (dict(cross_attn_config={}), "num_anchors"),
        (dict(features_list=2), "no sound VisualAD checkpoint"),
        (dict(image_size="84"), "no sound VisualAD checkpoint"),
        (dict(image_size=[84, 84]), "no sound VisualAD checkpoint"),
        (dict(backbone=["x"]), "no sound VisualAD checkpoint"),
        (dict(anomaly_token=torch.zeros(3)), "no sound VisualAD checkpoint"),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_an_error(checkpoint, tmp_path, change, message):
    path = save_checkpoint({**checkpoint, **change}, tmp_path)
    with pytest.raises(ValueError, match=message):
        VisualAD.from_pretrained(path, backbone_weights=CLIP)


def test_other_pth_files_and_unlisted_backbones_are_explained(checkpoint, tmp_path, clip):
    with pytest.raises(ValueError, match="ViT-tiny-golden.*backbone_weights"):
        VisualAD.from_pretrained(OFFICIAL)
    torch.save(clip, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match="no VisualAD checkpoint.*features_list"):
        VisualAD.from_pretrained(tmp_path / "clip.pth", backbone_weights=CLIP)
    path = save_checkpoint({**checkpoint, "backbone": "ViT-L/14@336px"}, tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        VisualAD.from_pretrained(path, backbone_weights=CLIP)


def test_the_released_files_are_the_pinned_ones():
    commit = "8479132d641456345019aed1c8bb6b2d11941068"
    assert visualad.OFFICIAL == f"https://media.githubusercontent.com/media/7HHHHH/VisualAD/{commit}"
    assert visualad.PRETRAINED == {
        "tiny": None,
        "clip-vit-l14-336-visa": (
            "weight/train_on_visa/CLIP.pth",
            "fed8ed5e0973e9adb53a2c91e066eb5ba3f9a42fbf80f115a26998629d1f0a5b",
        ),
        "clip-vit-l14-336-mvtec": (
            "weight/train_on_mvtec/CLIP.pth",
            "596f3ed0c0cfe78a314b41fc42a8adfc26b86ab1928f058ce256135cb407b32c",
        ),
    }


# --- ours


def test_saving_and_loading_is_bit_exact_for_a_backbone_hosted_nowhere(model, tmp_path):
    model.threshold, model.display_high = dict(value=0.1, size=[56, 56], sigma=4.0, made="x"), 0.7
    model.norm.weight.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = VisualAD.from_pretrained(tmp_path)
    assert same(model, loaded) and loaded.config() == model.config() and loaded.backbone.cfg == SMALL
    images = torch.rand(2, 3, 56, 56)
    assert torch.equal(model.infer(images)[0], loaded.infer(images)[0])


def test_a_hosted_backbone_is_not_saved_and_comes_from_where_it_is_hosted(monkeypatch, tmp_path, clip):
    cfg = replace(Backbone.from_weights(clip), repo="org/clip", layers=(2, 4), image_size=84)
    monkeypatch.setitem(BACKBONES, "listed", cfg)
    model = VisualAD.from_backbone("listed", CLIP).eval()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.learned().keys()
    assert json.loads((tmp_path / "config.json").read_text())["backbone"] == "listed"
    asked = []
    monkeypatch.setattr(
        visualad, "fetch", lambda repo, file, hub, instead: asked.append((repo, file)) or CLIP
    )
    assert same(model, VisualAD.from_pretrained(tmp_path)) and asked == [("org/clip", "model.safetensors")]
    assert same(model, VisualAD.from_pretrained(tmp_path, backbone_weights=clip)) and len(asked) == 1


def test_other_weights_in_a_hosted_backbone_are_told(monkeypatch, tmp_path, clip, recwarn):
    cfg = replace(Backbone.from_weights(clip), repo="org/clip", layers=(2, 4), image_size=84)
    monkeypatch.setitem(BACKBONES, "listed", cfg)
    others = {k: v.clone() for k, v in clip.items()}
    others["visual.transformer.resblocks.3.mlp.c_fc.weight"] *= 1.01
    model = VisualAD.from_backbone("listed", others)
    model.threshold = dict(value=0.1, size=[84, 84], sigma=4.0)
    model.save_pretrained(tmp_path)
    half = {k: v.half() for k, v in others.items()}
    for right in (others, half):
        again = VisualAD.from_pretrained(tmp_path, backbone_weights=right, dtype=torch.bfloat16)
        assert again.threshold == model.threshold
        again.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "backbone weights" in str(w.message)]
    with pytest.warns(UserWarning, match="was trained on backbone weights of digest .*: its scores mean"):
        assert VisualAD.from_pretrained(tmp_path, backbone_weights=clip).threshold is None


def test_a_link_stays_one_and_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    visualad.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/stdout", "/dev/fd/1"):
        with pytest.raises(ValueError, match="is no regular file"):
            visualad.check_target(visualad.Path(path))
    if os.path.isdir("/dev/shm"):  # memory, where many keep what is read often
        visualad.check_target(visualad.Path("/dev/shm/a.json"))
    with pytest.raises(ValueError, match="pipe is no regular file"):
        visualad.write_atomic(tmp_path / "pipe", b"new")
    with pytest.raises(ValueError, match="real is no folder"):
        visualad.check_target(tmp_path / "real" / "a.json")
    assert (tmp_path / "pipe").is_fifo()


def test_the_lone_file_is_complete_and_its_header_decides(model, tmp_path):
    model.save_pretrained(tmp_path, config={"data": "mine"})
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "moved.safetensors"
    (tmp_path / "model.safetensors").rename(file)
    assert same(model, VisualAD.from_pretrained(file)) and same(model, VisualAD.from_pretrained(str(file)))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["format"] == "pt" and json.loads(header["config"])["data"] == "mine"
    with pytest.raises(FileNotFoundError):
        VisualAD.from_pretrained(tmp_path)


def test_config_json_is_a_copy_of_the_header(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == json.loads((tmp_path / "config.json").read_text())


def test_final_norm_chooses_for_our_files_too(model, tmp_path):
    model.norm.weight.data += 0.1
    model.threshold, model.display_high = dict(value=0.5, size=[56, 56], sigma=4.0, made="by hand"), 0.7
    model.save_pretrained(tmp_path)
    kept = VisualAD.from_pretrained(tmp_path, final_norm="checkpoint")
    assert same(model, kept) and kept.threshold == model.threshold and kept.display_high == 0.7
    plain = VisualAD.from_pretrained(tmp_path, final_norm="backbone")
    assert plain.threshold is None and plain.display_high is None  # they were for other scores
    assert torch.equal(plain.norm.weight, model.backbone.norm.weight)
    plain.norm.weight.data += 1  # not the same memory
    assert torch.equal(plain.backbone.norm.weight, model.backbone.norm.weight)


def test_a_backbones_file_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="config in its header.*backbone_weights"):
        VisualAD.from_pretrained(CLIP)
    save_file({"tokens": torch.zeros(2, 2)}, tmp_path / "a.safetensors", {"config": '{"backbone": "vit-x"}'})
    with pytest.raises(ValueError, match="vit-x"):
        VisualAD.from_pretrained(tmp_path / "a.safetensors")
    save_file({"tokens": torch.zeros(2, 2)}, tmp_path / "a.safetensors", {"config": '{"backbone": "tiny"}'})
    with pytest.raises(ValueError, match="layers"):
        VisualAD.from_pretrained(tmp_path / "a.safetensors")


def test_an_edited_or_truncated_file_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "sca.2.alpha"}, tmp_path / "b.safetensors", header)
    with pytest.raises(ValueError, match=r"missing: sca\.2\.alpha"):
        VisualAD.from_pretrained(tmp_path / "b.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors"):
        VisualAD.from_pretrained(tmp_path)


def test_a_full_disk_loses_nothing(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model.tokens.data += 1

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_model_is_written_after_its_copies_and_an_edited_card_is_kept(model, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(visualad, "write_atomic", lambda path, data: written.append(path.name))
    model.save_pretrained(tmp_path)
    assert written == ["README.md", "config.json", "model.safetensors"]
    monkeypatch.undo()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_tells_how_to_load_and_carries_notes(model, tmp_path):
    model.save_pretrained(tmp_path / "m", repo_id="me/m", model_card_kwargs={"notes": "Trained on {braces}."})
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'VisualAD.from_pretrained("me/m")' in card and "Trained on {braces}." in card
    assert card.startswith("---\nlibrary_name: visualad\n")


def test_a_folder_whose_name_is_no_utf8_takes_a_model(model, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    model.save_pretrained(folder)
    folder = folder.rename(tmp_path / "plain")  # which safetensors can read
    assert same(VisualAD.from_pretrained(folder), model) and "caf" in (folder / "README.md").read_text()


def test_dtype_casts_the_frozen_blocks_only(tmp_path, model):
    model.save_pretrained(tmp_path)
    half = VisualAD.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        frozen = name.startswith("backbone.") and not name.startswith("backbone.norm.")
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    maps, score = half.infer(torch.rand(1, 3, 56, 56))
    assert maps.dtype == score.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        dict(layers="24"), dict(layers=2), dict(anchors="4"), dict(image_size="56"), dict(threshold=5),
        dict(threshold={"value": "a", "size": [1, 1], "sigma": 1}), dict(threshold=[1]),
        dict(sigma="4"), dict(sigma=-1), dict(sigma=float("inf")),
        *(dict(backbone={**asdict(SMALL), **change}) for change in (
            dict(width="64"), dict(patch=0), dict(activation="x"), dict(registers=-1), dict(wheels=4),
            dict(repo="evil/repo", file="pytorch_model.bin"),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_a_value_error(model, tmp_path, change):
    config = {**model.config(), **change}
    save_file(model.state_dict(), tmp_path / "a.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match="a.safetensors"):
        VisualAD.from_pretrained(tmp_path / "a.safetensors")


def test_a_header_may_leave_out_threshold_and_sigma_and_half_precision_comes_back_in_fp32(model, tmp_path):
    later = ("sigma", "threshold", "display_high", "backbone_digest")
    config = {k: v for k, v in model.config().items() if k not in later}
    half = {k: v.half() for k, v in model.state_dict().items()}
    save_file(half, tmp_path / "a.safetensors", {"config": json.dumps(config)})
    loaded = VisualAD.from_pretrained(tmp_path / "a.safetensors")
    assert loaded.threshold is None and loaded.tokens.dtype == torch.float32 and loaded.sigma == 4


def test_device_and_dtype_are_checked_and_honoured(model, tmp_path):
    model.save_pretrained(tmp_path, config={"layers": [1], "mine": 1})  # ours cannot be overridden
    assert VisualAD.from_pretrained(tmp_path, device="meta").tokens.device.type == "meta"
    for dtype in (torch.int8, "float16"):
        with pytest.raises(ValueError, match="dtype"):
            VisualAD.from_pretrained(tmp_path, dtype=dtype)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            VisualAD.from_pretrained(tmp_path, device="cuda")


@pytest.mark.parametrize(
    "weights", [None, 7, [1], {0: torch.zeros(1)}, {"cls_token": torch.zeros(3)}], ids=str
)
def test_what_is_no_backbone_is_a_value_error(weights):
    with pytest.raises(ValueError):
        backbone_state(weights)


def test_misspelt_arguments_are_not_swallowed():
    with pytest.raises(TypeError):
        VisualAD.from_backbone("tiny", local_file_only=True)


@pytest.mark.parametrize("source", ["no-such-model", "no/such/model/here", "gone.safetensors", "a/gone.pth"])
def test_unknown_sources_list_what_is_taken(source):
    with pytest.raises(FileNotFoundError, match="clip-vit-l14-336-visa.*Hugging Face repo id"):
        VisualAD.from_pretrained(source)


def test_loading_draws_no_random_numbers(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    VisualAD.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), want)


def test_a_header_that_cannot_be_built_names_its_file_also_by_a_bare_name(monkeypatch, tmp_path):
    VisualAD.from_pretrained("tiny").save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with safe_open("model.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["backbone"]["heads"] = 3
    save_file(load_file("model.safetensors"), "model.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match="model.safetensors is no sound VisualAD checkpoint.*heads=3"):
        VisualAD.from_pretrained("model.safetensors")
