"""A writable cache over caches that are only read."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from feature_cache import (
    CorruptRecordError,
    FeatureCache,
    MissingRecordError,
    NotACacheError,
    Record,
    StoreError,
)
from feature_cache.store.layers import FolderLayer
from feature_cache.store.remote import Remote, open_remote, pull, push
from feature_cache.testing import FakeBackbone
from hugging_face_server import hub
from s3_server import aws, bucket, endpoint, service

__all__ = ["aws", "bucket", "endpoint", "hub", "service"]


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """All files of a cache but those that say who uses it."""
    files = (file for file in root.rglob("*") if file.is_file())
    return {
        str(file.relative_to(root)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in files
        if file.relative_to(root).parts[0] not in ("processes", "uses")
    }


def same(left, right) -> bool:
    pairs = zip(left, right, strict=True)
    return all(np.array_equal(a.features, b.features) for a, b in pairs)


@pytest.fixture
def shared(tmp_path, small):
    """A cache of others with the first four of six frames, and these records."""
    frames, masks = small
    cache = FeatureCache(tmp_path / "shared")
    records = cache.get_or_compute(frames[:4], masks[:4], FakeBackbone())
    return cache.store.root, [Record(r.features.copy(), r.labels) for r in records]


@pytest.fixture
def pushed(shared, bucket):
    """What was pushed of it elsewhere."""
    url = f"s3://{bucket.name}/features"
    push(shared[0], open_remote(url))
    return url


class Counting(FakeBackbone):
    """Counts the frames that it embeds."""

    frames = 0

    def embed(self, images):
        self.frames += len(images)
        return super().embed(images)


@pytest.mark.parametrize("promote", [False, True])
def test_only_what_no_layer_has_is_computed_and_written_here(tmp_path, small, shared, promote):
    root, records = shared
    before, backbone = snapshot(root), Counting()
    cache = FeatureCache(tmp_path / "own", layers=[root], promote=promote)
    found = cache.get_or_compute(*small, backbone)
    assert backbone.frames == 2
    assert same(found[:4], records)
    assert snapshot(root) == before
    own = FeatureCache(tmp_path / "own", "r")
    assert own.contains(*small, FakeBackbone()) == [promote] * 4 + [True] * 2
    assert same(cache.get_or_compute(*small, backbone), found)
    assert backbone.frames == 2


def test_a_promoted_pack_is_the_same_and_read_without_the_layer(tmp_path, small, shared):
    root, records = shared
    frames, masks = small
    cache = FeatureCache(tmp_path / "own", layers=[root], promote=True)
    cache.get(frames[:1], masks[:1], FakeBackbone())
    shutil.rmtree(root)
    own = FeatureCache(tmp_path / "own", "r")
    assert same(own.get(frames[:4], masks[:4], FakeBackbone()), records)
    assert own.verify(deep=True) == []


def test_a_promotion_that_fails_stops_nothing(tmp_path, small, shared, monkeypatch, caplog):
    root, records = shared
    frames, masks = small
    cache = FeatureCache(tmp_path / "own", layers=[root], promote=True)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert same(cache.get(frames[:4], masks[:4], FakeBackbone()), records)
    assert "No space left" in caplog.text
    assert not any(name.startswith(".tmp") for name in os.listdir(cache.store.root))


def test_upper_layers_come_first_and_each_is_asked_for_what_is_missing(tmp_path, small, shared):
    root, _ = shared
    frames, masks = small
    second = FeatureCache(tmp_path / "second")
    second.get_or_compute(frames[3:5], masks[3:5], FakeBackbone())
    backbone = Counting()
    cache = FeatureCache(tmp_path / "own", layers=[root, second.store.root])
    assert cache.contains(*small, backbone) == [True] * 5 + [False]
    cache.get_or_compute(*small, backbone)
    assert backbone.frames == 1


def test_a_damaged_record_of_a_layer_is_computed_here_and_left_there(
    tmp_path, small, shared, caplog
):
    root, records = shared
    frames, masks = small
    [chunk] = root.rglob("features/c.0.0")
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    before, backbone = snapshot(root), Counting()
    cache = FeatureCache(tmp_path / "own", layers=[root])
    with caplog.at_level(logging.WARNING, "feature_cache"):
        assert same(cache.get_or_compute(frames[:4], masks[:4], backbone), records)
    assert backbone.frames == 1
    assert "checksum" in caplog.text
    assert snapshot(root) == before
    alone = FeatureCache(root, "r")
    with pytest.raises(CorruptRecordError, match="verify --repair"):
        alone.get(frames[:1], masks[:1], FakeBackbone())


def test_a_layer_that_vanishes_is_left_out_with_a_warning(tmp_path, small, shared, caplog):
    root, _ = shared
    cache = FeatureCache(tmp_path / "own", layers=[root])
    shutil.rmtree(root)
    root.write_text("no folder any more")
    backbone = Counting()
    assert len(cache.get_or_compute(*small, backbone)) == 6
    assert backbone.frames == 6


def test_what_a_layer_knows_and_can_not_give_is_computed(tmp_path, small, shared, monkeypatch):
    root, _ = shared
    cache, backbone = FeatureCache(tmp_path / "own", layers=[root]), Counting()

    def fail(*_):
        raise StoreError("the disk is away")

    monkeypatch.setattr(FolderLayer, "find", fail)
    assert cache.contains(*small, backbone)[:4] == [True] * 4
    assert len(cache.get_or_compute(*small, backbone)) == 6
    assert backbone.frames == 6


def test_a_file_url_is_a_folder_below_that_is_read_in_place(tmp_path, small, shared):
    root, records = shared
    frames, masks = small
    cache = FeatureCache((tmp_path / "own").as_uri(), layers=[root.as_uri()])
    before = snapshot(root)
    assert same(cache.get(frames[:4], masks[:4], FakeBackbone()), records)
    assert cache.stats()["packs"] == 0
    assert snapshot(root) == before
    assert cache.store.root == tmp_path / "own"
    assert same(
        pickle.loads(pickle.dumps(cache)).get(frames[:4], masks[:4], FakeBackbone()), records
    )


class WebServer(SimpleHTTPRequestHandler):
    """Gives the files of a folder, and ranges of them; lists nothing, takes nothing."""

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        data, asked = (
            file.read_bytes(),
            re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""),
        )
        self.send_response(206 if asked else 200)
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(int(file.stat().st_mtime)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def web(tmp_path):
    """A folder, and the address at which a web server gives what is in it."""
    pytest.importorskip("obstore")  # by which it is pushed to
    folder = tmp_path / "www"
    folder.mkdir()
    serve = partial(WebServer, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/features"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("pooling", ["mean_patches_exact", None])
def test_what_was_pushed_is_a_layer_by_a_plain_link(tmp_path, small, shared, web, pooling):
    root, _ = shared
    frames, masks = small
    options = {"pooling": pooling, "dtype": "float16"}
    theirs = FeatureCache(root).get_or_compute(frames[:4], masks[:4], FakeBackbone(), **options)
    folder, url = web
    push(root, open_remote(f"file://{folder}/features"))
    backbone = Counting()
    cache = FeatureCache(tmp_path / "own", layers=[url])
    assert same(cache.get(frames[:4], masks[:4], backbone, **options), theirs)
    cache.get_or_compute(*small, backbone, **options)
    assert backbone.frames == 2

    FeatureCache(root).get_or_compute(*small, FakeBackbone(), **options)
    push(root, open_remote(f"file://{folder}/features"))  # another pack, which is in the table
    fresh = FeatureCache(tmp_path / "fresh", layers=[url])
    assert fresh.contains(*small, backbone, **options) == [True] * 6


def test_a_pack_on_the_web_that_names_too_many_files_is_a_miss(tmp_path, small, shared, web):
    root, theirs = shared
    folder, url = web
    push(root, open_remote(f"file://{folder}/features"))
    for file in folder.glob("features/spaces/*/packs/*/features/zarr.json"):
        metadata = json.loads(file.read_bytes())
        metadata["shape"][0] = 1 << 46
        metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = 1
        file.write_text(json.dumps(metadata))
    backbone = Counting()
    frames, masks = small
    cache = FeatureCache(tmp_path / "own", layers=[url])
    assert same(cache.get_or_compute(frames[:4], masks[:4], backbone), theirs)
    assert backbone.frames == 4


@pytest.mark.parametrize("part", ["pull_pack", "version"])
def test_a_remote_that_is_away_is_asked_once_and_left_out_for_a_while(
    tmp_path, small, shared, web, monkeypatch, part
):
    root, theirs = shared
    folder, url = web
    push(root, open_remote(f"file://{folder}/features"))
    cache, backbone, tries = FeatureCache(tmp_path / "own", layers=[url]), Counting(), []

    def fail(*args, **_):
        tries.append(args)
        raise StoreError("the network is away")

    monkeypatch.setattr(Remote, part, fail)
    assert same(cache.get_or_compute(*small, backbone)[:4], theirs)
    assert backbone.frames == 6
    assert cache.get(*small, backbone, dtype="float32") == [None] * 6
    assert len(tries) == {"pull_pack": 1, "version": 3}[part]  # each space by itself, grids too


def test_a_remote_that_no_thread_can_read_is_left_out(tmp_path, small, shared, web, monkeypatch):
    folder, url = web
    push(shared[0], open_remote(f"file://{folder}/features"))
    cache, backbone = FeatureCache(tmp_path / "own", layers=[url]), Counting()

    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr("feature_cache.store.remote.streams.ThreadPoolExecutor.submit", refuse)
    assert cache.get(*small, backbone) == [None] * 6


def test_a_web_server_is_no_place_to_push_to_or_to_pull_from(tmp_path, shared, web):
    _, url = web
    with pytest.raises(StoreError, match=r"can't write to http://.*--layer"):
        push(shared[0], open_remote(url))
    with pytest.raises(NotACacheError, match="no feature cache at http://"):
        FeatureCache(tmp_path / "own", layers=[url])
    push(shared[0], open_remote(f"file://{web[0]}/features"))
    with pytest.raises(StoreError, match=r"can't list http://.*--layer"):
        pull(tmp_path / "own", open_remote(url))


@pytest.mark.parametrize("place", ["", "@main/some/folder"])
def test_a_dataset_of_the_hub_is_pushed_to_pulled_from_and_a_layer(
    tmp_path, small, shared, hub, place
):
    (root, records), url = shared, f"hf://datasets/lab/features{place}"
    assert push(root, open_remote(url)).packs == 1
    assert push(root, open_remote(url)).packs == 0
    frames, masks = small
    cache = FeatureCache(tmp_path / "own", layers=[url])
    assert same(cache.get(frames[:4], masks[:4], FakeBackbone()), records)
    assert pull(tmp_path / "other", open_remote(url)).packs == 1
    [sent] = hub.rglob("spaces/*/packs/*/features/c.0.0")
    data = bytearray(sent.read_bytes())
    data[0] ^= 1
    sent.write_bytes(data)
    assert len(pull(tmp_path / "third", open_remote(url)).failures) == 1


def test_datasets_of_the_hub_that_are_no_caches(tmp_path, hub, shared, monkeypatch):
    with pytest.raises(NotACacheError, match="no feature cache at hf://datasets/lab/features/no"):
        FeatureCache(tmp_path / "own", layers=["hf://datasets/lab/features/no"])
    with pytest.raises(StoreError, match="names no dataset"):
        open_remote("hf://datasets/lab")
    with pytest.raises(StoreError, match="can't read hf://datasets/lab/other"):
        push(shared[0], open_remote("hf://datasets/lab/other"))
    (hub / "data.csv").write_text("1,2")
    with pytest.raises(NotACacheError, match=r"it holds 'data\.csv'"):
        push(shared[0], open_remote("hf://datasets/lab/features"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreError, match="can't read hf://datasets/lab/features"):
        push(shared[0], open_remote("hf://datasets/lab/features"))


def test_no_remote_is_at_an_address_that_lacks_a_cache(tmp_path, bucket):
    with pytest.raises(NotACacheError, match=f"no feature cache at s3://{bucket.name}/nothing"):
        FeatureCache(tmp_path / "own", layers=[Path(f"s3://{bucket.name}/nothing")])


def test_wrong_layers_are_errors_at_once(tmp_path, shared):
    with pytest.raises(NotACacheError, match="nowhere does not exist"):
        FeatureCache(tmp_path / "own", layers=[tmp_path / "nowhere"])
    with pytest.raises(NotACacheError, match="nothing does not exist"):
        FeatureCache(tmp_path / "own", layers=[f"file://{tmp_path / 'nothing'}"])


def test_reading_alone_over_layers(tmp_path, small, shared):
    root, records = shared
    frames, masks = small
    FeatureCache(tmp_path / "own")
    cache = FeatureCache(tmp_path / "own", "r", layers=[root])
    assert same(cache.get(frames[:4], masks[:4], FakeBackbone()), records)
    with pytest.raises(MissingRecordError, match="can only be read"):
        cache.get_or_compute(*small, FakeBackbone())


def test_a_pickle_opens_the_same_layers(tmp_path, small, shared):
    root, records = shared
    frames, masks = small
    cache = FeatureCache(tmp_path / "own", layers=[root], promote=True, codec="zstd")
    again = pickle.loads(pickle.dumps(cache))
    assert (again.codec, again.promote) == ("zstd", True)
    assert same(again.get(frames[:4], masks[:4], FakeBackbone()), records)


def test_a_remote_layer_brings_packs_when_they_are_wanted(tmp_path, small, shared, pushed):
    _, records = shared
    frames, masks = small
    backbone = Counting()
    cache = FeatureCache(tmp_path / "own", layers=[pushed])
    assert cache.stats()["packs"] == 0
    assert cache.contains(*small, backbone) == [True] * 4 + [False] * 2
    assert same(cache.get_or_compute(*small, backbone)[:4], records)
    assert backbone.frames == 2
    own = FeatureCache(tmp_path / "own", "r")
    assert same(own.get(frames[:4], masks[:4], FakeBackbone()), records)
    assert same(pickle.loads(pickle.dumps(own)).get(frames[:4], masks[:4], backbone), records)


def test_a_miss_explains_itself_by_what_a_layer_has(tmp_path, small, shared):
    cache = FeatureCache(tmp_path / "own", layers=[shared[0]])
    frames, masks = small
    [reason] = cache.explain(frames[:1], masks[:1], FakeBackbone(), dtype="float32")
    assert "float16 stored, float32 asked" in reason.reason
