"""The hub, played by a local server that the real huggingface_hub talks to, and its cache."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from modernbert_align.backends.hub import HubId, fetch_snapshot, parse_hub_id
from modernbert_align.core.hub_cache import published_sha256
from modernbert_align.errors import CheckpointError, ConfigError, MissingPackageError, UsageError

NAME = "owner/some-model"
COMMIT, OLD_COMMIT = "8949b909ec900327062f0ebf497f51aef5e6f0c8", "0123456789abcdef0123456789abcdef01234567"
CARRIED = ("tokenizer.json", "LICENSE")
INDEX_OF = '{{"weight_map": {{"a": "{0}-1-of-2{1}", "b": "{0}-2-of-2{1}"}}}}'
SHARDED = {"config.json": b"{}", "model.safetensors.index.json": INDEX_OF.format("model", ".safetensors").encode()}


class Hub(ThreadingHTTPServer):
    """As much of the hub as reading one model takes.

    Attributes:
        files: Content by name.
        refs: Commit by branch or tag.
        refusal: Status and headers of every answer, instead of the above; only of files if `lists` is set.
        asked: Paths that were asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {}
        self.refs = {"main": COMMIT, "v1": COMMIT, "refs/pr/1": COMMIT}
        self.refusal, self.lists = None, False
        self.asked = []
        self.agents = set()

    @property
    def downloaded(self):
        """Names of the files whose content was asked for."""
        return sorted(path.rpartition("/")[2] for method, path in self.asked if "/resolve/" in path and method == "GET")


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        hub.agents.add(self.headers["User-Agent"])
        if hub.refusal is not None and not (hub.lists and path.startswith("/api/")):
            return self.answer(*hub.refusal)
        if path.startswith(f"/{NAME}/resolve/"):
            revision, _, name = path.removeprefix(f"/{NAME}/resolve/").rpartition("/")
            if name not in hub.files:
                return self.answer(404, {"X-Error-Code": "EntryNotFound"})
            content = hub.files[name]
            large = name.endswith((".safetensors", ".bin", ".pdparams"))
            tag = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
            return self.answer(200, {"ETag": f'"{tag}"', "X-Repo-Commit": hub.refs.get(revision, revision)}, content)
        if not path.startswith(f"/api/models/{NAME}"):
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            return self.answer_json(
                [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in hub.files.items()]
            )
        revision = path.partition("/revision/")[2] or "main"
        if revision not in {*hub.refs, *hub.refs.values()}:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": name} for name in hub.files]
        if "blobs=" in self.path:
            files = [{**file, "size": len(hub.files[file["rfilename"]])} for file in files]
        return self.answer_json({"id": NAME, "sha": hub.refs.get(revision, revision), "siblings": files})

    def answer_json(self, document):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_arguments):
        pass


@contextmanager
def running_hub():
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield hub
        hub.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; huggingface_hub read the environment when it was imported."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch):
    with running_hub() as server:
        use_endpoint(monkeypatch, server.url)
        server.files = {
            "config.json": b"{}",
            "tokenizer.json": b"[]",
            "README.md": b"#",
            "model.safetensors": b"weights",
            "pytorch_model.bin": b"the same weights",
            "onnx/model.onnx": b"once more",
        }
        yield server


@pytest.fixture
def offline(cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def use_endpoint(monkeypatch, url):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # version 0 has a copy of it
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def unreachable(cache, monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:1")


def put_in_cache(cache, files, commit=COMMIT, ref="main"):
    """Lay files out as huggingface_hub does; returns the snapshot."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    if ref:
        (repository / "refs" / ref).write_text(commit)
    for name, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def fetch(model=NAME, told=None):
    return fetch_snapshot(parse_hub_id(model), CARRIED, [].append if told is None else told.append)


def failure(kind, model=NAME):
    """The error of a fetch: one line, no period, and a hint."""
    with pytest.raises(kind) as caught:
        fetch(model)
    for text in (caught.value.message, caught.value.hint):
        assert text
        assert "\n" not in text
        assert not text.endswith(".")
    return caught.value


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("model", "repository", "revision"),
    [
        ("answerdotai/ModernBERT-base", "answerdotai/ModernBERT-base", None),
        ("answerdotai/ModernBERT-base@v1.0", "answerdotai/ModernBERT-base", "v1.0"),
        (f"a/b@{COMMIT}", "a/b", COMMIT),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ("_a/b.c_d-e@feature/x+y", "_a/b.c_d-e", "feature/x+y"),
    ],
)
def test_hub_id_is_split_at_the_revision(model, repository, revision):
    hub_id = parse_hub_id(model)
    assert (hub_id.repository, hub_id.revision) == (repository, revision)
    assert hub_id.name == repository.replace("/", "--")
    assert str(hub_id) == model


@pytest.mark.parametrize(
    "model", ["base", "base@v1", "/a/b", "/a@b/c", "./a", "../a", "~/a", ".a/b@c", "a/b/c", "a/", "a/@b", "user@host/a"]
)
def test_what_does_not_look_like_a_hub_id_is_left_to_others(model):
    assert parse_hub_id(model) is None


@pytest.mark.parametrize(
    "revision",
    [
        "",
        " ",
        "a b",
        "..",
        "../x",
        "a/../b",
        "a..b",
        "/a",
        "a/",
        "a//b",
        "-a",
        ".a",
        "a/.b",
        "a\\b",
        "a\nb",
        "a;b",
        "a:b",
    ],
)
def test_revision_that_cannot_be_one_is_refused(revision):
    with pytest.raises(UsageError) as caught:
        parse_hub_id(f"owner/name@{revision}")
    assert "owner/name@" in caught.value.message
    assert "`owner/name`" in caught.value.hint


@pytest.mark.parametrize(
    "model", ["a/..", "a/b..c", "a/b--c", "a/.b", "-a/b", "a/b-", "a/b c", "a/b.git", "a/" + "b" * 95]
)
def test_repository_that_cannot_be_one_is_refused(model):
    with pytest.raises(UsageError, match="neither a directory nor a hub id") as caught:
        parse_hub_id(model)
    assert "owner/name@revision" in caught.value.hint
    with pytest.raises(UsageError, match="neither a directory nor a hub id"):
        parse_hub_id(f"{model}@main")


def test_model_is_downloaded_into_an_empty_cache(hub, cache):
    told = []
    folder = fetch(told=told)
    assert folder == cache / "models--owner--some-model" / "snapshots" / COMMIT
    assert names(folder) == hub.downloaded == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert published_sha256(folder / "model.safetensors") == hashlib.sha256(b"weights").hexdigest()
    assert told == [
        f"looking up {NAME} on the Hugging Face hub",
        f"downloading 3 files, 11 bytes, of {NAME} into {cache}",
    ]


def test_model_that_is_cached_is_not_downloaded_again(hub):
    folder = fetch()
    hub.asked.clear()
    told = []
    assert fetch(told=told) == folder
    assert len(told) == 1
    assert hub.asked == [("GET", f"/api/models/{NAME}")]


def test_model_fetched_once_is_found_offline(hub, offline, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folders = {model: fetch(model) for model in (NAME, f"{NAME}@v1", f"{NAME}@refs/pr/1", f"{NAME}@{COMMIT}")}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    for model, folder in folders.items():
        assert fetch(model) == folder
    assert not hub.asked


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", COMMIT])
def test_revision_is_resolved_to_its_commit(hub, revision):
    hub.refs["main"] = OLD_COMMIT
    assert fetch(f"{NAME}@{revision}").name == COMMIT
    assert fetch().name == OLD_COMMIT


def test_index_and_shards_are_of_one_commit(hub, cache):
    hub.files = {**SHARDED, "model-1-of-2.safetensors": b"1", "model-2-of-2.safetensors": b"2"}
    hub.refs["main"] = OLD_COMMIT
    assert names(fetch(f"{NAME}@v1")) == sorted(hub.files)
    assert names(cache / "models--owner--some-model" / "snapshots") == [COMMIT]


def test_branch_that_moved_is_downloaded_anew(hub, cache):
    put_in_cache(cache, {"config.json": b"{}", "model.safetensors": b"old weights"}, OLD_COMMIT)
    folder = fetch()
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (cache / "models--owner--some-model" / "refs" / "main").read_text() == COMMIT


def test_branch_that_moved_to_a_cached_commit_is_remembered(hub, cache):
    fetch(f"{NAME}@{COMMIT}")
    put_in_cache(cache, {"config.json": b"{}", "model.safetensors": b"old weights"}, OLD_COMMIT)
    told = []
    assert fetch(told=told).name == COMMIT
    assert len(told) == 1
    assert (cache / "models--owner--some-model" / "refs" / "main").read_text() == COMMIT


def test_snapshot_that_is_incomplete_is_completed(hub, cache):
    put_in_cache(cache, {"config.json": b"{}", "tokenizer.json": b"[]"})
    told = []
    assert names(fetch(told=told)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert told[-1].startswith("downloading 1 file, 7 bytes, ")
    assert hub.downloaded == ["model.safetensors"]


SAFETENSORS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"]
TORCH = ["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin", "pytorch_model.bin.index.json"]
PADDLE = ["model_state-1-of-2.pdparams", "model_state-2-of-2.pdparams", "model_state.pdparams.index.json"]
SINGLE = ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"]


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (SINGLE + SAFETENSORS + TORCH + PADDLE, ["model.safetensors"]),
        (SINGLE[1:] + SAFETENSORS + TORCH + PADDLE, SAFETENSORS),
        (SINGLE[1:] + TORCH + PADDLE, ["pytorch_model.bin"]),
        (SINGLE[2:] + TORCH + PADDLE, TORCH),
        (SINGLE[2:] + PADDLE, ["model_state.pdparams"]),
        (PADDLE, PADDLE),
    ],
)
def test_weights_are_fetched_in_the_best_format_only(hub, there, fetched):
    stems = {"safetensors": "model", "bin": "pytorch_model", "pdparams": "model_state"}
    hub.files = {"config.json": b"{}"}
    for name in there:
        end = name.removesuffix(".index.json").rpartition(".")[2]
        hub.files[name] = INDEX_OF.format(stems[end], f".{end}").encode() if name.endswith(".json") else name.encode()
    assert names(fetch()) == hub.downloaded == ["config.json", *fetched]


def test_shards_are_those_that_the_index_names(hub):
    index = {"weight_map": {"a": "odd[1].safetensors", "b": "extra.bin", "c": "odd[1].safetensors"}}
    hub.files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "odd[1].safetensors": b"1",
        "odd1.safetensors": b"2",
        "model-00001-of-00001.safetensors": b"3",
        "extra.bin": b"4",
    }
    assert names(fetch()) == ["config.json", "extra.bin", "model.safetensors.index.json", "odd[1].safetensors"]


@pytest.mark.parametrize("shard", ["../x", "a/b", "/etc/passwd", "..", ".", "", "a\\b", "C:\\x", "a\0"])
def test_shard_outside_the_folder_is_refused_before_it_is_fetched(hub, shard):
    hub.files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": shard}}).encode(),
    }
    hub.files[shard] = b"x"
    assert "outside its folder" in failure(CheckpointError).message
    assert hub.downloaded == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_index_that_is_none_is_refused(hub, index):
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": index.encode("latin-1")}
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json` is not a valid index"):
        fetch()


def test_shard_that_the_repository_lacks_is_named(hub):
    hub.files = {
        "config.json": b"{}",
        "model.safetensors.index.json": INDEX_OF.format("model", ".safetensors").encode(),
        "model-1-of-2.safetensors": b"1",
    }
    assert "`model-2-of-2.safetensors`" in failure(CheckpointError).message
    assert hub.downloaded == ["model.safetensors.index.json"]


def test_repository_without_weights_says_what_it_has(hub):
    del hub.files["model.safetensors"], hub.files["pytorch_model.bin"]
    error = failure(CheckpointError)
    assert "model.safetensors, pytorch_model.bin, model_state.pdparams" in error.message
    assert "onnx/model.onnx" in error.hint
    assert not hub.downloaded


def test_repository_without_config_is_refused_before_anything_is_fetched(hub):
    del hub.files["config.json"]
    assert "no config.json" in failure(ConfigError).message
    assert not hub.downloaded


def test_cache_that_cannot_be_written_is_named(hub, cache):
    cache.write_text("a file")
    error = failure(CheckpointError)
    assert f"cannot write to the hub cache `{cache}`" in error.message
    assert "HF_HUB_CACHE" in error.hint


def test_download_that_breaks_off_is_not_called_a_missing_model(hub, monkeypatch):
    import huggingface_hub

    def break_off(*_arguments, **_options):
        raise RuntimeError("Data processing error\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", break_off)
    error = failure(UsageError)
    assert f"`{NAME}` could not be downloaded" in error.message
    assert "(Data processing error)" in error.message
    assert "run the command again" in error.hint


def test_download_that_leaves_a_file_out_is_noticed(hub, cache, monkeypatch):
    import huggingface_hub

    snapshot = put_in_cache(cache, {"config.json": b"{}"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_arguments, **_options: str(snapshot))
    assert "lacks `model.safetensors`" in failure(CheckpointError).message


INVALID = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("status", "headers", "token", "message", "hint"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "", "is gated and you are not logged in", "hf auth login"),
        (403, {"X-Error-Code": "GatedRepo"}, "hf_x", "is gated and your account has no access", f"/{NAME}"),
        (401, {"X-Error-Code": "RepoNotFound"}, "", "the hub has no public model of that name", "hf auth login"),
        (404, {"X-Error-Code": "RepoNotFound"}, "hf_x", "that your token may read", "hf auth whoami"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "", "no branch, tag or commit `main`", f"/{NAME}/tree/main"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "", "has disabled", f"/{NAME}"),
        (401, INVALID, "hf_x", "does not accept your token", "HF_TOKEN"),
        (403, {"X-Error-Message": "no"}, "hf_x", "does not let your token read", "read access"),
        (403, {"X-Error-Message": "no"}, "", "wants to know who asks", "hf auth login"),
        (401, {}, "", "wants to know who asks", "hf auth login"),
        (429, {}, "", "too many requests from here (HTTP 429)", "hf auth login"),
        (429, {}, "hf_x", "too many requests from here (HTTP 429)", f"hf download {NAME}"),
        (500, {}, "", "answers with HTTP 500", "try again later"),
        (503, {}, "", "answers with HTTP 503", f"hf download {NAME}"),
        (404, {}, "", "answers with HTTP 404", "HF_ENDPOINT"),
        (400, {}, "", "answers with HTTP 400", "HF_ENDPOINT"),
        (200, {}, "", "cannot be reached (Expecting value", "HF_ENDPOINT"),
    ],
)  # fmt: skip
def test_what_the_hub_answers_is_explained(hub, cache, monkeypatch, status, headers, token, message, hint):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.refusal = (status, headers)
    error = failure(UsageError)
    assert message in error.message
    assert NAME in error.message + error.hint or "token" in error.message
    assert hint in error.hint
    assert not cache.exists()


def test_gated_repository_that_lets_its_files_be_listed_is_explained(hub):
    hub.refusal, hub.lists = (401, {"X-Error-Code": "GatedRepo"}), True
    assert "is gated and you are not logged in" in failure(UsageError).message
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": b"{}"}
    assert "is gated and you are not logged in" in failure(UsageError).message


def test_files_that_the_token_may_not_read_are_explained(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    hub.refusal, hub.lists = (403, {"X-Error-Message": "no"}), True
    assert "the hub does not let your token read" in failure(UsageError).message


def test_missing_revision_is_named(hub):
    assert "`owner/some-model` has no branch, tag or commit `v2`" in failure(UsageError, f"{NAME}@v2").message


def test_missing_revision_is_not_replaced_by_a_cached_one(hub, cache):
    put_in_cache(cache, {"config.json": b"{}", "model.safetensors": b"weights"}, ref="v2")
    failure(UsageError, f"{NAME}@v2")


@pytest.mark.parametrize("refusal", [(401, {"X-Error-Code": "GatedRepo"}), (401, {}), (429, {}), (502, {})])
def test_cached_snapshot_is_used_when_the_hub_refuses_and_the_refusal_is_told(hub, cache, refusal):
    snapshot = put_in_cache(cache, {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.refusal = refusal
    told = []
    assert fetch(told=told) == snapshot
    assert told[-1].endswith(f"; using the snapshot {COMMIT} of {NAME} in the cache")


def test_refusal_counts_more_than_an_incomplete_snapshot(hub, cache):
    put_in_cache(cache, {"config.json": b"{}"})
    hub.refusal = (401, {"X-Error-Code": "GatedRepo"})
    assert "is gated" in failure(UsageError).message


def test_hub_that_does_not_answer_is_given_up(hub, cache, monkeypatch):
    from huggingface_hub import constants

    release = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(Answer, "do_GET", lambda _self: release.wait(30))
    start = time.monotonic()
    assert "cannot be reached" in failure(UsageError).message
    assert time.monotonic() - start < 10
    release.set()


@pytest.mark.usefixtures("unreachable")
def test_unreachable_hub_and_empty_cache_says_what_where_and_what_to_run(cache):
    error = failure(UsageError, f"{NAME}@v1")
    assert f"`{NAME}@v1` is not a directory" in error.message
    assert "its revision `v1` is not in the hub cache" in error.message
    assert f"`{cache}`" in error.message
    assert "the hub at http://127.0.0.1:1 cannot be reached (" in error.message
    assert error.message.endswith("refused)")
    assert f"`hf download {NAME} --revision v1`" in error.hint


@pytest.mark.usefixtures("unreachable")
def test_complete_snapshot_is_used_when_the_hub_cannot_be_reached(cache):
    snapshot = put_in_cache(cache, {"config.json": b"{}", "model.safetensors": b"weights"})
    told = []
    assert fetch(told=told) == snapshot
    assert "cannot be reached" in told[-1]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_and_empty_cache_says_that_offline_mode_is_on(cache, monkeypatch, variable):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, "1")
    error = failure(UsageError)
    assert "its revision `main` is not in the hub cache" in error.message
    assert f"`{cache}`" in error.message
    assert f"offline mode is on (`{variable}` is set)" in error.message
    assert f"unset {variable} and run `hf download {NAME}`" in error.hint


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "weights", [["model.safetensors"], SAFETENSORS, ["pytorch_model.bin"], TORCH, ["model_state.pdparams"], PADDLE]
)
def test_any_whole_format_will_do_offline(cache, weights):
    index = weights[-1]
    content = dict.fromkeys(weights, b"weights")
    if index.endswith(".index.json"):
        stem, end = index.removesuffix(".index.json").split(".")
        content[index] = INDEX_OF.format(stem, f".{end}").encode()
    snapshot = put_in_cache(cache, {"config.json": b"{}", **content})
    told = []
    assert fetch(told=told) == snapshot
    assert told == [f"offline mode is on (`HF_HUB_OFFLINE` is set); using the snapshot {COMMIT} of {NAME} in the cache"]


@pytest.mark.usefixtures("offline")
def test_offline_revision_is_found_by_branch_and_by_commit(cache):
    whole = {"config.json": b"{}", "model.safetensors": b"weights"}
    main, old = put_in_cache(cache, whole), put_in_cache(cache, whole, OLD_COMMIT, ref="v0")
    assert fetch() == fetch(f"{NAME}@main") == fetch(f"{NAME}@{COMMIT}") == main
    assert fetch(f"{NAME}@v0") == fetch(f"{NAME}@{OLD_COMMIT}") == old


@pytest.mark.usefixtures("offline")
def test_offline_revision_that_is_not_cached_is_not_replaced_by_another(cache):
    put_in_cache(cache, {"config.json": b"{}", "model.safetensors": b"weights"})
    error = failure(UsageError, f"{NAME}@v2")
    assert "its revision `v2` is not in the hub cache" in error.message
    assert f"`hf download {NAME} --revision v2`" in error.hint
    assert f"what the cache holds is `{NAME}@{COMMIT}`" in error.hint


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        ({}, "`config.json`"),
        ({"model.safetensors": b"weights"}, "`config.json`"),
        ({"config.json": b"{}"}, "`model.safetensors`"),
        (SHARDED, "`model-1-of-2.safetensors` and 1 more"),
        ({**SHARDED, "model-1-of-2.safetensors": b"1"}, "`model-2-of-2.safetensors`"),
    ],
)
def test_incomplete_snapshot_names_the_missing_file_and_what_to_run(cache, files, lacks):
    snapshot = put_in_cache(cache, files, ref="v1")
    error = failure(CheckpointError, f"{NAME}@v1")
    assert f"the snapshot `{snapshot}` lacks {lacks} and offline mode is on" in error.message
    assert f"`hf download {NAME} --revision v1`" in error.hint


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_link_whose_blob_is_gone_is_a_missing_file(cache, name):
    snapshot = put_in_cache(cache, {"config.json": b"{}", name: b"weights"} if name != "config.json" else {name: b"{}"})
    (snapshot / name).resolve().unlink()
    error = failure(CheckpointError)
    assert f"lacks `{name}` and the hub at" in error.message
    assert f"`hf download {NAME}`" in error.hint


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match="hub ids need huggingface_hub"):
        fetch_snapshot(HubId(repository=NAME), CARRIED, print)


@pytest.mark.parametrize(("name", "value"), [("HF_HUB_ETAG_TIMEOUT", "soon"), ("HF_ENDPOINT", "http://[x")])
def test_setting_that_huggingface_hub_cannot_read_is_no_bug(tmp_path, name, value):
    command = [sys.executable, "-m", "modernbert_align", "convert", "--src", "hf", "--dst", "paddle", "--model", NAME]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", name: value}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_command_downloads_from_the_hub_and_keeps_stdout_clean(tmp_path, fixture_folder):
    source = fixture_folder("tiny")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with running_hub() as hub:
        hub.files = {path.name: path.read_bytes() for path in source.iterdir()}
        hub.files["pytorch_model.bin"] = b"the same weights"
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        command = ["convert", "--src", "hf", "--dst", "paddle", "--model", f"{NAME}@v1", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "modernbert_align", *command],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["out"] == "checkpoints/owner--some-model-paddle"
    assert result["manifest"]["source"]["revision"] == COMMIT
    assert "pytorch_model.bin" not in hub.downloaded
    assert (tmp_path / result["out"] / "tokenizer.json").read_bytes() == hub.files["tokenizer.json"]
    looking, downloading, *_ = done.stderr.splitlines()
    assert looking == f"looking up {NAME}@v1 on the Hugging Face hub"
    assert downloading.startswith("downloading ")
    assert "%|" not in done.stderr  # no bars off a terminal
    assert not any("torch" in agent for agent in hub.agents)
