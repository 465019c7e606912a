"""Guards what the network brings and takes: models and backbones from Hugging Face, uploads to it, and the
authors' checkpoints. The real client code talks to a local server; nothing leaves this machine.

    python -m pytest tests/test_download.py
"""

import hashlib
import json
import os
import re
import socket

import pytest
import torch
from servers import CLIP, GOLDEN, Client, Server, hosted, load, start

import visualad
from visualad import Backbone, VisualAD

NAME = "clip-vit-l14-336-visa"
OFFICIAL = GOLDEN / "visualad_official.pth"
SHA256 = hashlib.sha256(OFFICIAL.read_bytes()).hexdigest()
FILE = "/user/model/resolve/main/model.safetensors"
FILE_V2 = FILE.replace("main", "v2")
BACKBONE_FILE = "/org/backbone/resolve/main/open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def one_thread():
    """As in the client: the same sums in the same order here and there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def client(server, tmp_path):
    with Client(server.url, tmp_path / "home") as client:
        yield client


@pytest.fixture
def saved(tmp_path):
    """A function that makes a model, its backbone hosted nowhere, and saves it: -> its folder."""

    def make(seed=0):
        torch.manual_seed(seed)
        model = VisualAD(Backbone(32, 4, 2, 4, 4, image_size=16))
        model.threshold = dict(value=0.5, size=[16, 16], sigma=4.0, made="by hand")
        model.save_pretrained(tmp_path / f"saved{seed}")
        return tmp_path / f"saved{seed}"

    return make


def content(folder):
    return (folder / "model.safetensors").read_bytes()


def half(body):
    return body[: len(body) // 2]


def zeros(body):
    return bytes(len(body))


# --- Hugging Face: a whole model -------------------------------------------------------------------------
def test_a_repo_id_loads_the_saved_model_bit_for_bit(server, client, saved):
    server.files[FILE] = content(saved())
    assert client("load", "user/model") == load(saved())
    assert [(asked.method, asked.path) for asked in server.asked] == [("HEAD", FILE), ("GET", FILE)]


def test_a_cached_copy_comes_before_the_network_until_a_download_is_forced(server, client, saved, tmp_path):
    old, new, cache = saved(0), saved(1), tmp_path / "cache"
    server.files[FILE] = content(old)
    assert client("load", "user/model", cache_dir=cache) == load(old)
    assert (cache / "models--user--model").is_dir()
    server.files[FILE] = content(new)
    server.asked.clear()
    assert client("load", "user/model", cache_dir=cache) == load(old)
    assert client("load", "user/model", cache_dir=cache, local_files_only=True) == load(old)
    assert server.asked == []
    assert client("load", "user/model", cache_dir=cache, force_download=True) == load(new)


def test_revision_and_token_are_sent(server, client, saved):
    server.files = {FILE: content(saved(0)), FILE_V2: content(saved(2))}
    assert client("load", "user/model", revision="v2", token="secret") == load(saved(2))
    assert {asked.token for asked in server.asked} == {"Bearer secret"}


def test_local_files_only_asks_nothing_and_says_what_is_missing(server, client, saved):
    server.files[FILE] = content(saved())
    with pytest.raises(FileNotFoundError, match="model.safetensors of user/model"):
        client("load", "user/model", local_files_only=True)
    assert server.asked == []


def test_a_missing_repo_and_a_missing_file_are_named_with_the_way_around(server, client, saved):
    for present in ({}, {"/user/model/resolve/main/other": b""}):
        server.files = present
        with pytest.raises(FileNotFoundError) as error:
            client("load", "user/model")
        assert re.search("model.safetensors of user/model .*; give a local folder or file", str(error.value))
    server.files[FILE] = content(saved())
    assert client("load", "user/model") == load(saved())


def test_a_body_that_is_cut_is_an_error_and_the_next_load_is_whole(server, client, saved, tmp_path):
    server.files[FILE], server.spoil = content(saved()), half
    with pytest.raises(FileNotFoundError, match="model.safetensors of user/model"):
        client("load", "user/model")
    with pytest.raises(FileNotFoundError, match="model.safetensors of user/model"):
        client("load", "user/model", local_files_only=True)
    server.heal()
    assert client("load", "user/model") == load(saved())


def test_a_body_that_is_no_model_is_an_error_each_time_until_a_download_is_forced(server, client, saved):
    server.files[FILE], server.spoil = content(saved()), zeros
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model\.safetensors has no sound VisualAD config"):
            client("load", "user/model")
        server.heal()
    assert client("load", "user/model", force_download=True) == load(saved())


# --- Hugging Face: the backbone of a learned part --------------------------------------------------------
@pytest.fixture
def learned(monkeypatch, tmp_path):
    """The folder of a model whose backbone is hosted, so that its file holds the learned part alone."""
    monkeypatch.setitem(visualad.BACKBONES, "hosted", hosted())
    torch.manual_seed(0)
    VisualAD.from_backbone("hosted", CLIP).save_pretrained(tmp_path / "learned")
    return tmp_path / "learned"


def test_the_backbone_comes_from_its_own_repo_with_the_token_but_not_the_revision(server, client, learned):
    server.files[FILE.replace("main", "v2")], server.files[BACKBONE_FILE] = (
        content(learned),
        CLIP.read_bytes(),
    )
    found = client("load", "user/model", revision="v2", token="secret")
    assert found == load(learned, backbone_weights=CLIP)
    paths = [asked.path for asked in server.asked if asked.method == "GET"]
    assert paths == [FILE_V2, BACKBONE_FILE]
    assert {asked.token for asked in server.asked} == {"Bearer secret"}
    server.asked.clear()
    assert client("load", learned) == found and client("load", "user/model", revision="v2") == found
    assert server.asked == []


def test_from_backbone_takes_a_listed_backbone_from_its_repo(server, client, learned, tmp_path):
    server.files[BACKBONE_FILE] = CLIP.read_bytes()
    found = client("start", "hosted", token="secret", cache_dir=tmp_path / "cache")
    assert found == start("hosted", backbone_weights=CLIP)
    assert {asked.token for asked in server.asked} == {"Bearer secret"}
    server.asked.clear()
    assert client("start", "hosted", cache_dir=tmp_path / "cache", local_files_only=True) == found
    assert server.asked == []
    assert client("start", "hosted", cache_dir=tmp_path / "cache", force_download=True) == found
    assert ("GET", BACKBONE_FILE) in {(asked.method, asked.path) for asked in server.asked}


def test_a_backbone_that_cannot_be_had_says_to_pass_backbone_weights(server, client, learned):
    for task, source in (("load", learned), ("start", "hosted")):
        with pytest.raises(FileNotFoundError) as error:
            client(task, source)
        wanted = "open_clip_model.safetensors of org/backbone .*; pass backbone_weights=PATH"
        assert re.search(wanted, str(error.value))


# --- Hugging Face: uploads -------------------------------------------------------------------------------
def names(server, folder):
    return {path.removeprefix(folder) for path in server.files if path.startswith(folder)}


def test_push_to_hub_uploads_what_loads_back_bit_for_bit(server, client, saved):
    options = dict(commit_message="The first", private=True, branch="trial", token="secret")
    options |= dict(config=dict(trained_on="screws"), model_card_kwargs=dict(notes="Made of tin."))
    address = client("push", saved(), "user/new", **options)
    assert address.startswith(f"{server.url}/user/new/commit/") and server.messages == ["The first"]
    assert {asked.token for asked in server.asked} == {"Bearer secret"}
    assert b"private" in next(asked.body for asked in server.asked if asked.path == "/api/repos/create")
    there = "/user/new/resolve/trial/"
    assert names(server, there) == {"README.md", "config.json", "model.safetensors"}
    assert len(server.files) == 3
    assert json.loads(server.files[f"{there}config.json"])["trained_on"] == "screws"
    card = server.files[f"{there}README.md"].decode()
    assert 'from_pretrained("user/new")' in card and "Made of tin." in card
    assert client("load", "user/new", revision="trial") == load(saved())


def test_save_pretrained_can_push_and_saves_the_same_file_here(server, client, saved, tmp_path):
    options = dict(push_to_hub=True, token="secret", ignore_patterns=["*.json"], commit_message="Again")
    address = client("save", saved(), tmp_path / "kept", repo_id="user/new", **options)
    assert address.startswith(f"{server.url}/user/new/commit/") and server.messages == ["Again"]
    assert {asked.token for asked in server.asked} == {"Bearer secret"}
    assert names(server, "/user/new/resolve/main/") == {"README.md", "model.safetensors"}
    assert load(tmp_path / "kept") == load(saved()) == client("load", "user/new")


def test_save_pretrained_pushes_under_the_folders_name_if_none_is_given(server, client, saved, tmp_path):
    client("save", saved(), tmp_path / "kept", push_to_hub=True, token="secret")
    assert client("load", "user/kept") == load(saved())
    assert b'from_pretrained("user/kept")' in server.files["/user/kept/resolve/main/README.md"]


def test_save_pretrained_pushes_the_card_with_its_notes(server, client, saved, tmp_path):
    notes = dict(model_card_kwargs=dict(notes="Made of tin."))
    client("save", saved(), tmp_path / "kept", push_to_hub=True, repo_id="user/new", token="secret", **notes)
    assert "Made of tin." in (tmp_path / "kept" / "README.md").read_text()
    assert b"Made of tin." in server.files["/user/new/resolve/main/README.md"]


def test_a_card_that_the_repository_has_stays_unless_a_new_one_has_notes(server, client, saved):
    there = "/user/new/resolve/main/README.md"
    client("push", saved(), "user/new", token="secret")
    server.files[there] = b"written by hand"
    client("push", saved(), "user/new", token="secret")
    assert server.files[there] == b"written by hand"
    client("push", saved(), "user/new", token="secret", model_card_kwargs=dict(notes="Made of tin."))
    assert b"Made of tin." in server.files[there]


# --- the authors' checkpoints ----------------------------------------------------------------------------
@pytest.fixture
def mirror(server, monkeypatch):
    """A server of the golden checkpoint as if it were one of the authors' files."""
    path = "weight/train_on_visa/CLIP.pth"
    monkeypatch.setitem(visualad.PRETRAINED, NAME, (path, SHA256))
    monkeypatch.setenv("VISUALAD_URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.files[f"/{path}"] = OFFICIAL.read_bytes()
    return server


@pytest.fixture
def cached(tmp_path):
    return tmp_path / "checkpoints" / f"visualad-{NAME}-{SHA256[:8]}.pth"


@pytest.fixture
def by_name(tmp_path):
    """The model by its name, from the mirror, cached in tmp_path."""
    return lambda **options: load(NAME, **{"backbone_weights": CLIP, "cache_dir": tmp_path, **options})


def test_the_authors_file_is_downloaded_once_under_its_name_and_hash(mirror, by_name, cached):
    assert by_name() == load(OFFICIAL, backbone_weights=CLIP)
    assert os.listdir(cached.parent) == [cached.name] and cached.read_bytes() == OFFICIAL.read_bytes()
    assert len(mirror.asked) == 1
    assert by_name() == by_name(local_files_only=True) == load(OFFICIAL, backbone_weights=CLIP)
    assert len(mirror.asked) == 1
    assert by_name(force_download=True) == load(OFFICIAL, backbone_weights=CLIP)
    assert len(mirror.asked) == 2


def test_without_a_cache_dir_it_goes_to_the_cache_of_torch_hub(
    mirror, by_name, cached, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    by_name(cache_dir=None)
    assert (tmp_path / "torch" / "hub" / "checkpoints" / cached.name).is_file() and not cached.exists()


def test_a_cache_dir_may_begin_with_a_tilde(mirror, by_name, cached, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    by_name(cache_dir="~/cache")
    assert (tmp_path / "cache" / "checkpoints" / cached.name).is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("spoil", [half, zeros])
def test_a_cut_or_wrong_answer_leaves_nothing_and_the_next_is_whole(mirror, by_name, cached, spoil):
    mirror.spoil = spoil
    with pytest.raises(FileNotFoundError, match=re.escape(f"could not get {mirror.url}/weight/")):
        by_name()
    assert os.listdir(cached.parent) == []
    mirror.heal()
    assert by_name() == load(OFFICIAL, backbone_weights=CLIP)


@pytest.mark.parametrize("spoil", [half, zeros])
def test_a_forced_download_that_fails_keeps_the_good_copy(mirror, by_name, cached, spoil):
    by_name()
    mirror.spoil = spoil
    with pytest.raises(FileNotFoundError):
        by_name(force_download=True)
    assert os.listdir(cached.parent) == [cached.name]
    assert by_name() == load(OFFICIAL, backbone_weights=CLIP)


def test_a_missing_file_is_named_with_the_path_to_put_it_at(mirror, by_name, cached):
    mirror.files.clear()
    with pytest.raises(FileNotFoundError) as error:
        by_name()
    assert f"{mirror.url}/weight/train_on_visa/CLIP.pth" in str(error.value)
    assert f"put it at {cached}" in str(error.value)
    cached.write_bytes(OFFICIAL.read_bytes())
    assert by_name() == load(OFFICIAL, backbone_weights=CLIP)


def test_a_cached_file_that_was_damaged_is_named_and_not_used(mirror, by_name, cached):
    by_name()
    mirror.asked.clear()
    data = bytearray(OFFICIAL.read_bytes())
    data[len(data) // 2] ^= 1
    cached.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{re.escape(str(cached))} is damaged: .* delete it"):
        by_name()
    assert mirror.asked == []
    cached.unlink()
    assert by_name() == load(OFFICIAL, backbone_weights=CLIP)


def test_local_files_only_never_asks_for_the_authors_file(mirror, by_name, cached):
    with pytest.raises(FileNotFoundError, match="local_files_only"):
        by_name(local_files_only=True)
    assert mirror.asked == [] and not cached.exists()


# --- no network ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", autouse=True)
def unplugged(tmp_path_factory):
    """A client that asks a port where nobody listens. It gives up after 25 s: started first, read last."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with Client(url, tmp_path_factory.mktemp("home"), limit=300) as client:
            client.send("load", "user/model")
            yield client


def test_without_a_network_the_file_that_is_missing_is_named(unplugged):
    with pytest.raises(FileNotFoundError, match="model.safetensors of user/model .*; give a local folder"):
        unplugged.receive()
