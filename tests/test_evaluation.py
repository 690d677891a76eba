"""Which features tell cells apart: on movies of which it is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from feature_cache import (
    Evaluation,
    FeatureCache,
    FrameError,
    Movie,
    MovieError,
    evaluate,
    load_backbone,
)
from feature_cache.cli import app
from feature_cache.movies import write_movie
from feature_cache.testing import FakeBackbone

STEP, CELLS, FRAMES = 24, 16, 12


def tiles(seed: int = 0) -> np.ndarray:
    """Give each cell a pattern (CELLS, 8, 8) of its own; brightness and contrast are all alike."""
    rng = np.random.default_rng(seed)
    plain = np.repeat([0, 1], 32)
    return np.stack([rng.permutation(plain) for _ in range(CELLS)]).reshape(CELLS, 8, 8)


def textured(
    places: np.ndarray, patterns: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw squares of 16 pixels at places (T, CELLS, 2); without patterns, noise all over."""
    rng = np.random.default_rng(1)
    size = int(places.max()) + STEP
    frames = rng.random((len(places), size, size)).astype(np.float32)
    masks = np.zeros(frames.shape, np.int32)
    for t, cells in enumerate(places):
        for number, (y, x) in enumerate(cells):
            square = np.s_[t, y : y + 16, x : x + 16]
            masks[square] = number + 1
            if patterns is not None:
                frames[square] = np.tile(patterns[number], (2, 2)) + 0.1 * frames[square]
    return frames, masks


def resting() -> np.ndarray:
    """Give each cell its slot of a 4x4 grid in all frames: (FRAMES, CELLS, 2)."""
    slots = np.stack(np.divmod(np.arange(CELLS), 4), axis=1) * STEP
    return np.tile(slots, (FRAMES, 1, 1))


def swapping(seed: int = 2) -> np.ndarray:
    """Deal out the slots anew in each frame, so that places tell nothing."""
    rng = np.random.default_rng(seed)
    return np.stack([slots[rng.permutation(CELLS)] for slots in resting()])


def tracked(root: Path, frames: np.ndarray, masks: np.ndarray) -> Path:
    tracks = np.array([[n, 0, len(frames) - 1, 0] for n in range(1, CELLS + 1)])
    write_movie(root, frames, masks, tracks)
    return root


def shares(found: Evaluation, step: int = 0) -> dict[str, float]:
    one = found.steps[step]
    return {score.setup.name: score.combined.value for score in one.scores} | {
        "position": one.position.value
    }


def test_features_that_tell_are_found_ranked_and_kept(tmp_path: Path) -> None:
    movie = tracked(tmp_path / "01", *textured(swapping(), tiles()))
    knows, noise = FakeBackbone(dim=8), load_backbone("debug/random", stride=7)
    found = evaluate(movie, [noise, knows], tmp_path / "cache", steps=[1, 3])
    assert found.movies == {f"{movie} TRA": "man_track.txt"}
    for step, result in enumerate(found.steps):
        assert result.cells == CELLS * (FRAMES - (1, 3)[step])
        assert abs(shares(found, step)["position"] - result.chance) < 0.1
        assert [score.setup.name for score in result.ranking] == ["fake", "debug/random"]
        assert result.best is result.scores[1]
        assert result.scores[1].alone.value > 0.95
        for share in (result.position, result.shape, *(s.alone for s in result.scores)):
            assert 0 <= share.low <= share.value <= share.high <= 1
        assert not result.scores[0].gain.is_positive
        assert "layer projection of fake, mean_patches_exact: +0." in result.verdict
    opened = Movie.open(movie)
    assert all(FeatureCache(tmp_path / "cache", "r").contains(opened, backbone=knows))


def test_of_candidates_as_near_as_each_other_none_is_left_out(tmp_path: Path) -> None:
    places = resting()
    places[1::2] += STEP // 2  # in the middle of up to four cells
    movie = tracked(tmp_path / "01", *textured(places))
    found = evaluate(movie, [FakeBackbone(dim=8)], tmp_path / "cache")
    assert found.steps[0].chance == (9 / 4 + 6 / 2 + 1) / CELLS


def test_nothing_helps_where_cells_rest(tmp_path: Path) -> None:
    movie = tracked(tmp_path / "01", *textured(resting(), tiles()))
    found = evaluate(movie, [FakeBackbone(dim=8)], tmp_path / "cache")
    assert shares(found)["position"] == 1.0
    assert found.verdict == "at step 1, position is enough here: features add nothing"


@pytest.mark.parametrize("places", [resting(), swapping()], ids=["resting", "swapping"])
def test_in_noise_nothing_helps(tmp_path: Path, places: np.ndarray) -> None:
    movie = tracked(tmp_path / "01", *textured(places))
    backbones = [FakeBackbone(dim=8, seed=seed) for seed in range(2)]
    found = evaluate(movie, backbones, tmp_path / "cache", poolings=["nearest_patch"], steps=[1, 2])
    assert [step.best for step in found.steps] == [None, None]
    assert all("features add nothing" in step.verdict for step in found.steps)


def test_with_shuffled_truth_every_arm_is_at_chance(tmp_path: Path) -> None:
    frames, masks = textured(resting(), tiles())
    rng = np.random.default_rng(3)
    dealt = np.stack([np.r_[0, 1 + rng.permutation(CELLS)][mask] for mask in masks])
    movie = tracked(tmp_path / "01", frames, dealt)
    found = evaluate(movie, [FakeBackbone(dim=8)], tmp_path / "cache")
    [step], [score] = found.steps, found.steps[0].scores
    for share in (step.position, step.shape, score.alone, score.combined):
        assert share.value == pytest.approx(step.chance, abs=0.05)  # chance is 1 in 16
    assert step.best is None
    assert "position and shape are at chance, and features add nothing" in step.verdict


def test_what_daughters_keep_of_their_mothers_is_found(tmp_path: Path) -> None:
    """Eight cells divide at time 6; all are dealt out anew in each frame."""
    frames, masks = textured(swapping(), np.tile(tiles()[:8], (2, 1, 1)))
    later = masks[:6] > 8
    frames[:6][later], masks[:6][later] = 0.5, 0
    masks[6:][masks[6:] > 0] += 8
    born = [[n + 9, 6, FRAMES - 1, n % 8 + 1] for n in range(CELLS)]
    tracks = np.array([[n, 0, 5, 0] for n in range(1, 9)] + born)
    write_movie(tmp_path / "01", frames, masks, tracks)
    found = evaluate(tmp_path / "01", [FakeBackbone(dim=8)], tmp_path / "cache")
    [step], [score] = found.steps, found.steps[0].scores
    assert step.cells == 5 * 8 + CELLS + 5 * CELLS
    assert step.position.low <= step.chance <= step.position.high
    # Sisters look alike: of these 80, half are found.
    assert score.alone.value == pytest.approx((5 * 8 + CELLS + 5 * 8) / step.cells, abs=0.1)
    assert step.best is score


def test_a_few_frames_that_agree_are_no_proof(tmp_path: Path) -> None:
    """In this noise, the features happen to gain one cell in each of the two frames."""
    movie = tracked(tmp_path / "01", *textured(swapping(11)[:3]))
    found = evaluate(movie, [FakeBackbone(dim=4, seed=3)], tmp_path / "cache")
    assert found.steps[0].scores[0].gain.value > 0
    assert found.steps[0].best is None


def test_what_one_half_teaches_wrongly_is_left_out(tmp_path: Path) -> None:
    """The stage drifts there and back: by its drift, a cell would be where its neighbour is."""
    places = resting() + 10 * np.minimum(np.arange(FRAMES), np.arange(FRAMES)[::-1])[:, None, None]
    frames, masks = textured(places, tiles())
    found = evaluate(tracked(tmp_path / "01", frames, masks), [FakeBackbone(dim=8)], tmp_path / "c")
    assert found.steps[0].position.value == 1.0


def test_shape_that_misleads_is_no_burden_for_features(tmp_path: Path) -> None:
    """Sizes tell cells apart in the first half, and are dealt anew in the second; a few move."""
    rng = np.random.default_rng(5)
    places, sizes = resting(), rng.permutation(np.repeat([6, 9, 12, 16], 4))
    for t in range(1, FRAMES):
        moving = rng.permutation(CELLS)[:4]
        places[t:, moving] = places[t, np.roll(moving, 1)]
    frames, masks = textured(places, tiles())
    for t, mask in enumerate(masks):
        if t >= FRAMES // 2:
            sizes = rng.permutation(sizes)
        for number, (y, x) in enumerate(places[t]):
            mask[y + sizes[number] : y + 16, x : x + 16] = 0
    noise = load_backbone("debug/random")
    found = evaluate(tracked(tmp_path / "01", frames, masks), [noise], tmp_path / "cache")
    [step], [score] = found.steps, found.steps[0].scores
    assert step.shape.value < step.position.value - 0.1
    assert score.combined.value > step.position.value - 0.05


def test_equal_features_are_chance_not_luck(tmp_path: Path) -> None:
    _, masks = textured(swapping())
    movie = tracked(tmp_path / "01", np.where(masks > 0, 1.0, 0.0), masks)
    found = evaluate(movie, [FakeBackbone(dim=8)], tmp_path / "cache")
    assert found.steps[0].scores[0].alone.value == pytest.approx(found.steps[0].chance, abs=0.01)


def test_links_by_overlap_of_stacks_with_divisions_and_gaps(cache: FeatureCache) -> None:
    """Two cells; one, of the largest label, divides at time 3; one is not there at time 5."""
    masks = np.zeros((8, 3, 24, 48), np.int32)
    masks[:, :, 4:20, 4:20] = 2**31 - 1
    masks[3:, :, 11:13, 4:20] = 0
    masks[3:, :, 13:20, 4:20] = 8
    masks[:, :, 8:16, 32:40] = 5
    masks[5, :, 8:16, 32:40] = 0
    frames = np.random.default_rng(0).random(masks.shape)
    found = evaluate(Movie.of(frames, masks), [FakeBackbone(dim=4)], cache, steps=[1, 2])
    assert list(found.movies.values()) == ["overlap"]
    # 7 links of the one that divides and 5 of its daughters' further ones; 5 of the other.
    assert found.steps[0].cells == 7 + 5 + 5
    assert found.steps[1].cells == 6 + 5 + 3
    assert found.steps[0].position.value > 0.8


def test_a_network_is_compared_with_its_random_twin(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(load_backbone("timm/test_vit", "random:7").module.state_dict(), weights)
    movie = tracked(tmp_path / "01", *textured(swapping()[:4], tiles()))
    name = f"timm/test_vit?weights={weights}"
    found = evaluate(movie, [name], tmp_path / "cache", layers=["0", "1"], device="cpu")
    setups = [score.setup for score in found.steps[0].scores]
    layers = ["blocks.0", "blocks.1"]
    assert [setup.layer for setup in setups] == 2 * layers
    assert [setup.random for setup in setups] == [False, False, True, True]
    spaces = FeatureCache(tmp_path / "cache", "r").spaces()
    assert len({space.spec["backbone"]["weights"] for space in spaces}) == 2
    assert len(spaces) == 4


def test_weights_that_are_compared_are_told_apart(tmp_path: Path) -> None:
    names = []
    for seed in (7, 8):
        file = tmp_path / f"weights{seed}.pt"
        torch.save(load_backbone("timm/test_vit", f"random:{seed}").module.state_dict(), file)
        names.append(f"timm/test_vit?weights={file}")
    movie = tracked(tmp_path / "01", *textured(swapping()[:4], tiles()))
    found = evaluate(movie, [*names, "timm/test_vit?weights=random:1"], tmp_path / "cache")
    setups = [str(score.setup) for score in found.steps[0].scores]
    assert len(set(setups)) == len(setups) == 4
    for text in ("weights7.pt", "weights8.pt", "random:1", "with random weights"):
        assert sum(text in one for one in setups) == 1


def test_layers_that_are_named_together_share_a_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    movie = tracked(tmp_path / "01", *textured(swapping()[:4], tiles()))
    kind, passes = type(load_backbone("timm/test_vit", "random:0").module), []
    whole = kind.forward_intermediates

    def count(self: torch.nn.Module, images: torch.Tensor, **options: object) -> object:
        passes.append(len(images))
        return whole(self, images, **options)

    monkeypatch.setattr(kind, "forward_intermediates", count)
    name = "timm/test_vit?weights=random:0&layer="
    found = evaluate(movie, [f"{name}0,1", f"{name}1,2"], tmp_path / "cache", device="cpu")
    setups = [score.setup for score in found.steps[0].scores]
    assert [setup.layer for setup in setups] == ["blocks.0", "blocks.1", "blocks.2"]
    assert sum(passes) == 4 + 4  # of layer 1 nothing is computed again


def test_options_are_told_and_a_tiled_network_has_a_random_twin(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(load_backbone("timm/test_vit", "random:7").module.state_dict(), weights)
    movie = tracked(tmp_path / "01", *textured(swapping()[:4], tiles()))
    name = f"timm/test_vit?weights={weights}&input_size=96"
    found = evaluate(movie, [name, f"{name}&tile=64"], tmp_path / "cache", device="cpu")
    setups = [score.setup for score in found.steps[0].scores]
    names = ["timm/test_vit?input_size=96", "timm/test_vit?input_size=96&tile=64"]
    assert [setup.name for setup in setups] == [names[0], names[0], names[1], names[1]]
    assert [setup.random for setup in setups] == [False, True, False, True]


def test_command(tmp_path: Path) -> None:
    movie = tracked(tmp_path / "01", *textured(resting(), tiles()))
    page = tmp_path / "page.html"
    words = ["evaluate", str(movie), "--cache", str(tmp_path / "cache"), "--step", "1",
             "--backbone", "debug/random", "--backbone", "debug/encoded_labels"]  # fmt: skip
    shown = CliRunner().invoke(app, [*words, "--step", "2", "--page", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "links from man_track.txt" in shown.stdout
    assert "position is enough here: features add nothing" in shown.stdout
    assert "layer noise of debug/random, mean_patches_exact" in page.read_text()
    words[3] = str(tmp_path / "other")
    below = ["--below", str(tmp_path / "cache")]
    told = json.loads(CliRunner().invoke(app, [*words, *below, "--json"]).stdout)
    assert not FeatureCache(tmp_path / "other", "r").stats()["records"]
    [step] = told["steps"]
    assert [one["name"] for one in step["setups"]] == ["debug/random", "debug/encoded_labels"]
    assert step["position"]["value"] == 1.0
    assert step["setups"][0]["bytes"] == CELLS * 128 * 2


def test_no_movies(cache: FeatureCache) -> None:
    with pytest.raises(ValueError, match=r"movies are \[\]: expected a list of one or more"):
        evaluate([], [FakeBackbone()], cache)


def test_too_few_frames(cache: FeatureCache) -> None:
    frames, masks = textured(resting()[:2], tiles())
    with pytest.raises(MovieError, match="16 links at step 1, in too few frames"):
        evaluate(Movie.of(frames, masks), [FakeBackbone()], cache)
    with pytest.raises(ValueError, match="step 0"):
        evaluate(Movie.of(frames, masks), [FakeBackbone()], cache, steps=[0])
    two = evaluate([Movie.of(frames, masks), Movie.of(frames, masks)], [FakeBackbone()], cache)
    assert two.steps[0].cells == 2 * CELLS
    assert list(two.movies) == ["movie 1", "movie 2"]
    movies = [Movie(Path("same"), one.frames, one.masks) for one in [Movie.of(frames, masks)] * 2]
    assert list(evaluate(movies, [FakeBackbone()], cache).movies) == ["same", "same (2)"]


def test_a_verdict_claims_chance_only_where_cells_are_many(tmp_path: Path) -> None:
    """Of eight cells in three frames, two swap places once."""
    places = resting()[:3, :8]
    places[2, :2] = places[2, 1::-1]
    movie = tracked(tmp_path / "01", *textured(places))
    [step] = evaluate(movie, [load_backbone("debug/random")], tmp_path / "cache").steps
    assert step.position.low <= step.chance < step.position.value
    assert "that 16 cells in 2 frames could show" in step.verdict


def test_that_position_is_enough_is_claimed_of_no_two_cells(tmp_path: Path) -> None:
    movie = tracked(tmp_path / "01", *textured(resting()[:3, :1]))
    [step] = evaluate(movie, [load_backbone("debug/random")], tmp_path / "cache").steps
    assert (step.position.value, step.chance) == (1, 1)
    assert "that 2 cells in 2 frames could show" in step.verdict


def test_cells_are_those_of_their_tracks(tmp_path: Path) -> None:
    """A bud is missing in a frame, where its mother lives on; another cell has no line."""
    frames, masks = textured(resting(), tiles())
    masks[:3][masks[:3] == 2] = 0
    masks[6][masks[6] == 2] = 0
    write_movie(tmp_path / "01", frames, masks, np.array([[1, 0, 11, 0], [2, 3, 11, 1]]))
    found = evaluate(tmp_path / "01", [FakeBackbone(dim=8)], tmp_path / "cache", steps=[1, 2])
    whole = [(CELLS - 1) * (FRAMES - step) for step in (1, 2)]
    # It is there in 8 frames; its parent is missing once, a step later, and is its mother at first.
    assert [step.cells for step in found.steps] == [whole[0] + 8 - 1, whole[1] + 8 - 1]
    assert list(found.movies.values()) == ["man_track.txt and labels (14 cells without a line)"]


def test_a_mask_of_other_numbers_is_named(cache: FeatureCache) -> None:
    frames, masks = textured(resting(), tiles())
    masks[4][masks[4] == 3] = -3
    with pytest.raises(FrameError, match=r"mask 4 of .*labels from -3"):
        evaluate(Movie.of(frames, masks), [FakeBackbone()], cache)


def test_a_half_whose_parents_are_beyond_reach_teaches_nothing(tmp_path: Path) -> None:
    """All of frame 1's two links are of cells that swap far places; then a crowd rests."""
    size = 20 * STEP
    masks = np.zeros((3, size, size), np.int32)
    slots = np.stack(np.divmod(np.arange(400), 20), axis=1) * STEP
    for t, order in enumerate(([0, 399], [399, 0], [399, 0])):
        for label, slot in enumerate([*order, *range(1, 399)] if t else order, start=1):
            y, x = slots[slot]
            masks[t, y : y + 16, x : x + 16] = label
    tracks = np.array([[n, 0 if n < 3 else 1, 2, 0] for n in range(1, 401)])
    write_movie(tmp_path / "01", np.zeros(masks.shape, np.float32) + masks[0], masks, tracks)
    found = evaluate(tmp_path / "01", [FakeBackbone(dim=4)], tmp_path / "cache")
    assert found.steps[0].cells == 402
