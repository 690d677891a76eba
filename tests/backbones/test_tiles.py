"""Large frames in tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_cache import BackboneError, FeatureCache, load_backbone
from feature_cache.backbones.tiles import Tiled, cut_axis, pixels_of_cell
from feature_cache.testing import FakeBackbone

FRAMES = torch.rand((2, 300, 420), generator=torch.Generator().manual_seed(0))
NAMES = ["efficientnet-lite0?layer=stride-4", "timm/test_vit?input_size=96", "debug/random"]


def load(name, **options):
    return load_backbone(name, "random:0", "cpu", **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_of_one_tile_is_what_it_is_without_and_has_another_key(name):
    whole, tiled = load(name), load(name, tile=420, halo=16)
    assert torch.equal(tiled.embed(FRAMES), whole.embed(FRAMES))
    assert tiled.spec != whole.spec
    assert tiled.spec.to_json()["extra"].items() >= {"tile": 420, "halo": 16}.items()
    assert load(name, tile=420).spec != tiled.spec


def test_behind_a_halo_nothing_is_seen_of_the_cuts():
    """Cells that see no farther than the halo are those of the frame as a whole."""
    name = "efficientnet-lite0?layer=stride-4"
    frames = FRAMES[:, :256, :384]
    whole = load(name).embed(frames)
    torch.testing.assert_close(load(name, tile=100, halo=64).embed(frames), whole)
    assert not torch.allclose(load(name, tile=100, halo=0).embed(frames), whole, atol=1e-3)


def test_what_is_seen_lies_where_it_is():
    """A network of a fixed input sees a square at its place, in a grid that is finer."""
    backbone = load("timm/test_vit?input_size=96&layer=0&tile=100&halo=25")
    dark = torch.zeros(1, 300, 420)
    bright = dark.clone()
    bright[:, 200:212, 312:324] = 1
    change = (backbone.embed(bright) - backbone.embed(dark)).norm(dim=-1)[0]
    rows, columns = change.shape
    assert (rows, columns) == (12, 19)
    row, column = divmod(int(change.argmax()), columns)
    assert abs((row + 0.5) * 300 / rows - 206) <= 300 / rows
    assert abs((column + 0.5) * 420 / columns - 318) <= 420 / columns


def test_the_network_sees_one_window_at_a_time():
    backbone = load("efficientnet-lite0?tile=64&halo=16")
    seen = []
    inner = backbone.backbone
    original = inner.embed
    vars(inner)["embed"] = lambda frames: seen.append(tuple(frames.shape)) or original(frames)
    backbone.embed(FRAMES[:1])
    assert len(set(seen)) == 1
    assert max(seen[0][1:]) <= 64 + 16 + 2 * 16


@pytest.mark.parametrize("length", [101, 128, 1000])
@pytest.mark.parametrize(("tile", "halo"), [(40, 0), (64, 10), (33, 200)])
def test_windows_own_each_pixel_once_and_see_all_of_it(length, tile, halo):
    windows = cut_axis(length, tile, halo)
    owned = [pixel for one in windows for pixel in range(*one.own)]
    assert owned == list(range(length))
    assert len({one.length for one in windows}) == 1
    for one in windows:
        assert 0 <= one.start <= one.own[0]
        assert one.own[1] <= one.start + one.length <= length


def test_it_fills_a_cache(cache, small):
    backbone = load("efficientnet-lite0?tile=40&halo=8")
    records = cache.get_or_compute(*small, backbone)
    again = FeatureCache(cache.store.root).get_or_compute(*small, backbone)
    assert all(np.array_equal(a.features, b.features) for a, b in zip(records, again, strict=True))
    assert cache.stats()["computed"] == len(records)


def test_how_much_a_cell_spans():
    spec = load("facebook/sam2.1-hiera-tiny").describe("")
    assert pixels_of_cell(spec, (4096, 4096)) == (64, 64)
    tiled = load_backbone("facebook/sam2.1-hiera-tiny?tile=1024&halo=0").describe("")
    assert pixels_of_cell(tiled, (4096, 4096)) == (16, 16)


@pytest.mark.parametrize("options", ["tile=0", "tile=8&halo=-1", "halo=8"])
def test_what_can_be_no_tile(options):
    with pytest.raises(BackboneError, match="halo="):
        load(f"efficientnet-lite0?{options}")


def test_layers_are_tiled_one_at_a_time():
    with pytest.raises(BackboneError, match="one layer at a time"):
        load("efficientnet-lite0?layer=stride-4,stride-8&tile=64")


class Whole(FakeBackbone):
    """Each cell knows all that is seen with it."""

    def embed(self, frames):
        return (
            super().embed(frames)
            + frames.std(dim=(-2, -1)).reshape(len(frames), -1)[:, -1:, None, None]
        )


def test_a_cache_tells_windows_in_time_tiles_and_halos_apart(cache, small):
    """Each gives other numbers; were a key alike, one would be served the other's."""
    frames, masks = (part[:2] for part in small)
    served = set()
    for context in (0, 0), (1, 0), (0, 1):
        inner = Whole(dim=4, context=context)
        tiled = [Tiled(inner, tile, halo) for tile in (20, 30) for halo in (None, 0)]
        for backbone in (inner, *tiled):
            records = cache.get_or_compute(frames, masks, backbone)
            served.add(b"".join(record.features.tobytes() for record in records))
    assert len(served) == 3 * 5


def test_tiles_are_not_laid_over_tiles_or_terms_of_the_same_name():
    with pytest.raises(BackboneError, match="has halo, tile, tiling in its spec already"):
        _ = Tiled(Tiled(FakeBackbone(), 64), 32).spec
