"""What the network brings and takes: models and backbones from Hugging Face, uploads to it, and the authors'
checkpoints. The real client code talks to a local server; nothing leaves this machine.
pytest tests/test_download.py"""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from conftest import CLIP, OFFICIAL, same
from huggingface_hub import constants
from servers import Server

import visualad
from visualad import Backbone, VisualAD

load = VisualAD.from_pretrained
NAME = "clip-vit-l14-336-visa"
NONE = "could not get {}: .*; give a local path"
FILE = "/user/model/resolve/main/model.safetensors"
FILE_V2 = FILE.replace("main", "v2")
BACKBONE_FILE = "/org/clip/resolve/main/open_clip_model.safetensors"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Hugging Face and the authors' host, for this process alone, with an empty cache and without waiting."""
    with Server() as server:
        urls = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(visualad, "HOST", server.url)
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
        monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's attempts
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


def saved(folder, seed=0):
    """A model whose backbone is hosted nowhere, and its file."""
    torch.manual_seed(seed)
    model = VisualAD(Backbone(32, 4, 2, 4, 4, image_size=16))
    model.threshold = 0.5
    model.save_pretrained(folder / f"saved{seed}")
    return model, (folder / f"saved{seed}" / "model.safetensors").read_bytes()


def half(body):
    return body[: len(body) // 2]


# --- Hugging Face: a whole model


def test_a_repo_id_loads_the_saved_model_bit_for_bit_and_then_without_a_network(server, tmp_path):
    model, server.files[FILE] = saved(tmp_path)
    found = load("user/model")
    assert same(found, model) and found.threshold == model.threshold
    assert [asked[:2] for asked in server.asked] == [("HEAD", FILE), ("GET", FILE)]
    server.asked.clear()
    assert same(load("user/model", local_files_only=True), model) and not server.asked
    server.shutdown()
    server.server_close()
    assert same(load("user/model"), model)  # from the cache
    with pytest.raises(FileNotFoundError, match=NONE.format("user/other")):
        load("user/other")


def test_what_cannot_be_had_is_named_and_a_later_load_is_whole(server, tmp_path):
    told = NONE.format("user/model")
    with pytest.raises(FileNotFoundError, match=told):
        load("user/model", local_files_only=True)
    assert not server.asked
    model, content = saved(tmp_path)
    for files in ({}, {FILE.replace("model.s", "other.s"): b""}, {FILE: content}):
        server.files, server.spoil = files, half
        with pytest.raises(FileNotFoundError, match=told):
            load("user/model")
    server.heal()
    assert same(load("user/model"), model)
    model, server.files[FILE] = saved(tmp_path, 1)
    assert same(load("user/model", force_download=True), model)


# --- Hugging Face: the backbone of a learned part


def test_the_backbone_comes_from_its_own_repo_with_the_token_but_not_the_revision(server, listed, tmp_path):
    model = VisualAD.from_backbone("listed", CLIP)
    model.save_pretrained(tmp_path / "learned")
    for call in (lambda: load(tmp_path / "learned"), lambda: VisualAD.from_backbone("listed")):
        with pytest.raises(FileNotFoundError, match="could not get org/clip: .*open_clip_model.safetensors"):
            call()
    server.asked.clear()
    saved = (tmp_path / "learned" / "model.safetensors").read_bytes()
    server.files, cache = {FILE_V2: saved}, dict(cache_dir=tmp_path / "cache")
    server.files[BACKBONE_FILE] = CLIP.read_bytes()
    assert same(load("user/model", revision="v2", token="secret", **cache), model)
    assert [asked.path for asked in server.asked if asked.method == "GET"] == [FILE_V2, BACKBONE_FILE]
    assert {asked.token for asked in server.asked} == {"Bearer secret"}
    server.asked.clear()
    assert same(load(tmp_path / "learned", local_files_only=True, **cache), model)
    fresh = VisualAD.from_backbone("listed", local_files_only=True, **cache)
    assert same(fresh.backbone.state_dict(), model.backbone.state_dict()) and not server.asked


# --- Hugging Face: uploads


def test_push_to_hub_uploads_what_loads_back_bit_for_bit(server, tmp_path):
    model, there = saved(tmp_path)[0], "/user/new/resolve/main/"
    options = dict(commit_message="The first", private=True, token="secret")
    address = model.push_to_hub("user/new", notes="Made of {tin}.", **options)
    assert address.startswith(f"{server.url}/user/new/commit/") and server.messages == ["The first"]
    assert {asked.token for asked in server.asked} == {"Bearer secret"}
    assert b"private" in next(asked.body for asked in server.asked if asked.path == "/api/repos/create")
    assert sorted(server.files) == [there + x for x in ("README.md", "config.json", "model.safetensors")]
    card = server.files[f"{there}README.md"].decode()
    assert 'VisualAD.from_pretrained("user/new")' in card and "Made of {tin}." in card
    assert same(load("user/new"), model) and load("user/new").threshold == model.threshold
    server.files[f"{there}README.md"] = b"written by hand"
    model.push_to_hub("user/new", token="secret", ignore_patterns="README.md")
    assert server.files[f"{there}README.md"] == b"written by hand"


# --- the authors' checkpoints


@pytest.fixture
def mirror(server, monkeypatch):
    """A server of the golden checkpoint as if it were one of the authors' files."""
    monkeypatch.setitem(visualad.PRETRAINED, NAME, hashlib.sha256(OFFICIAL.read_bytes()).hexdigest())
    server.files["/weight/train_on_visa/CLIP.pth"] = OFFICIAL.read_bytes()
    return server


@pytest.mark.parametrize("where", [None, "cache"])
def test_the_authors_file_is_downloaded_once_to_torch_hubs_cache_or_yours(mirror, official, tmp_path, where):
    folder = tmp_path / "cache" if where else tmp_path / "torch" / "checkpoints"
    for options in ({}, {}, dict(local_files_only=True)):
        options |= dict(cache_dir=where and str(folder))
        assert same(load(NAME, backbone_weights=CLIP, **options), official)
    (file,) = folder.iterdir()
    assert file.read_bytes() == OFFICIAL.read_bytes() and len(mirror.asked) == 1


def test_a_cut_wrong_or_missing_answer_leaves_nothing_and_the_next_is_whole(mirror, official, tmp_path):
    told, files = f"could not get {NAME}: {{}}.*; give a local path", mirror.files
    with pytest.raises(FileNotFoundError, match=f"visualad-{NAME}-.*.pth is not there"):
        load(NAME, backbone_weights=CLIP, local_files_only=True)
    assert not mirror.asked
    for cause, found, spoil in ((".*404", {}, None), ("", files, half), ("", files, lambda x: bytes(len(x)))):
        mirror.files, mirror.spoil = found, spoil
        with pytest.raises(FileNotFoundError, match=told.format(cause)):
            load(NAME, backbone_weights=CLIP)
        assert os.listdir(tmp_path / "torch" / "checkpoints") == []
        mirror.heal()
    assert same(load(NAME, backbone_weights=CLIP), official)
    next((tmp_path / "torch" / "checkpoints").iterdir()).write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=f"visualad-{NAME}-.*.pth cannot be read"):
        load(NAME, backbone_weights=CLIP)


def test_the_released_files_are_the_pinned_ones(monkeypatch, tmp_path):
    asked, commit = [], "8479132d641456345019aed1c8bb6b2d11941068"
    record = lambda url, _file, sha256, **_: asked.append((url, sha256))  # noqa: E731
    monkeypatch.setattr(torch.hub, "download_url_to_file", record)
    visa = "fed8ed5e0973e9adb53a2c91e066eb5ba3f9a42fbf80f115a26998629d1f0a5b"
    mvtec = "596f3ed0c0cfe78a314b41fc42a8adfc26b86ab1928f058ce256135cb407b32c"
    for data, sha256 in dict(visa=visa, mvtec=mvtec).items():
        with pytest.raises(FileNotFoundError):
            load(f"clip-vit-l14-336-{data}", cache_dir=tmp_path)
        url = f"https://media.githubusercontent.com/media/7HHHHH/VisualAD/{commit}/weight/train_on_{data}/CLIP.pth"
        assert asked.pop() == (url, sha256)
