"""The loss, its weights and schedule, the module that trains, and the model folder."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import sys
import warnings
from types import ModuleType

import pytest
import torch
import yaml
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from trackastra.data import CTCData, collate_sequence_padding
from trackastra.model import TrackingTransformer
from trackastra.utils import blockwise_causal_norm

from feature_cache import BackboneError, MissingDependencyError
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import ModelFeatures, wrap
from feature_cache.trackastra.train import make_trainer
from feature_cache.trackastra.training import (
    BestModel,
    TrackingModule,
    association_loss,
    drop_features,
    link_weights,
    make_model,
    save_model,
    warmup_cosine,
)
from feature_cache.train_options import parse_training
from forked_processes import apart

SMALL = {"d_model": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "window": 3}
SCRIPT = os.environ.get("TRACKASTRA_TRAIN_SCRIPT")


def random_batch(seed: int, sizes=(14, 9, 11), frames: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows of several sizes, padded, with chains of cells of which some divide."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for n in sizes:
        times = torch.arange(n) * frames // n
        cells = torch.randint(4, (n,), generator=generator)
        same = cells[:, None] == cells[None, :]
        samples.append(
            {
                "coords": torch.rand((n, 3), generator=generator),
                "features": torch.rand((n, 7), generator=generator),
                "timepoints": times,
                "assoc_matrix": (same & (times[:, None] < times[None, :])).float(),
            }
        )
    batch = collate_sequence_padding(samples)
    logits = 4 * torch.randn(batch["assoc_matrix"].shape, generator=generator)
    return logits, batch


def test_a_track_counts_twice_and_a_division_more():
    links = torch.zeros(4, 4)
    links[0, 1] = links[1, 2] = links[1, 3] = 1
    weights = link_weights(links, torch.tensor([0, 1, 2, 2]), 5.0)
    assert weights[0, 1] == 2
    assert weights[1, 2] == weights[1, 3] == 6
    assert weights[0, 2] == weights[2, 0] == 1


@pytest.mark.parametrize("norm", ["none", "linear", "softmax", "quiet_softmax"])
def test_the_loss_is_the_formula_pair_by_pair(norm):
    logits, batch = random_batch(1)
    losses, sizes = [], []
    for a, links, times, padded in zip(
        logits, batch["assoc_matrix"], batch["timepoints"], batch["padding_mask"], strict=True
    ):
        n = int((~padded).sum())
        a, links, times = a[:n, :n], links[:n, :n], times[:n]
        weights = link_weights(links, times, 3.0)
        likely = None if norm == "none" else blockwise_causal_norm(a, times, norm)
        terms = []
        for i in range(n):
            for j in range(n):
                if 0 < times[j] - times[i] <= 2:
                    term = nn.BCEWithLogitsLoss()(a[i, j], links[i, j])
                    if likely is not None:
                        term = 0.01 * term + nn.BCELoss()(likely[i, j], links[i, j])
                    terms.append(term * weights[i, j])
        losses.append(torch.stack(terms).mean())
        sizes.append(len(terms) ** 0.2)
    expected = sum(x * s for x, s in zip(losses, sizes, strict=True)) / sum(sizes)
    found = association_loss(logits, batch, causal_norm=norm, division_weight=3.0)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_what_is_padded_does_not_matter():
    logits, batch = random_batch(2)
    padded = batch["padding_mask"]
    other = logits.masked_fill(padded[:, :, None] | padded[:, None, :], 1e9)
    assert association_loss(other, batch) == association_loss(logits, batch)


def test_logits_beyond_half_precision_give_a_finite_loss():
    logits, batch = random_batch(3)
    assert torch.isfinite(association_loss(logits * torch.inf, batch, causal_norm="softmax"))


@pytest.mark.skipif(SCRIPT is None, reason="TRACKASTRA_TRAIN_SCRIPT names no upstream train.py")
@pytest.mark.parametrize("norm", ["none", "linear", "softmax", "quiet_softmax"])
@pytest.mark.filterwarnings("ignore")  # upstream's script
def test_the_loss_and_its_gradient_are_upstreams(norm, monkeypatch):
    upstream = load_script(monkeypatch)
    for seed in range(5):
        logits, batch = random_batch(seed)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        model = FixedLogits(theirs)
        module = upstream.WrappedLightningModule(
            model, causal_norm=norm, delta_cutoff=2, div_upweight=3.0
        )
        expected = module._common_step(batch)["loss"]
        found = association_loss(ours, batch, causal_norm=norm, division_weight=3.0)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        if (
            norm == "linear"
        ):  # upstream has no gradient here: it changes a sigmoid's output in place
            continue
        expected.backward()
        found.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(SCRIPT is None, reason="TRACKASTRA_TRAIN_SCRIPT names no upstream train.py")
@pytest.mark.filterwarnings("ignore")  # upstream's script
def test_the_schedule_is_upstreams(monkeypatch):
    upstream = load_script(monkeypatch)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = upstream.WarmupCosineLRScheduler(optimizer, warmup_epochs=5, max_epochs=20)
    for epoch in range(20):
        assert schedule.get_last_lr()[0] == pytest.approx(warmup_cosine(epoch, 5, 20))
        optimizer.step()
        schedule.step()


class FixedLogits(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: Tensor, **__: Tensor) -> Tensor:
        return self.logits.clone()


def load_script(monkeypatch) -> ModuleType:
    """Import upstream's script; what it only imports for its logs may be missing."""
    for name in ("git", "humanize", "wandb"):
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    spec = importlib.util.spec_from_file_location("upstream_train", str(SCRIPT))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rate_warms_up_and_falls():
    rates = [warmup_cosine(epoch, 4, 12) for epoch in range(12)]
    assert rates[0] == 0.01
    assert rates[4] == 1 == max(rates)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.001 < warmup_cosine(12, 4, 12) < 0.05


def samples(small_folder, cache, props: str | None = "regionprops2"):
    data = CTCData(str(small_folder()), window_size=3)
    return wrap(data, cache, FakeBackbone(dim=8), additional_props=props)


def loader(data, batch_size: int = 2) -> DataLoader:
    return DataLoader(data, batch_size=batch_size, collate_fn=collate_sequence_padding)


def trainer(*callbacks, epochs: int = 3, **options) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip


@pytest.mark.parametrize("props", ["regionprops2", "regionprops_small", None])
def test_one_window_is_predicted_as_in_a_batch_of_two(small_folder, cache, props):
    data = samples(small_folder, cache, props)
    module = TrackingModule(
        make_model(pretrained_feat_dim=8, additional_props=props, **SMALL), epochs=1
    )
    module.eval().double()  # upstream's encoding magnifies the rounding of float32
    both, single = (
        {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
        for batch in (next(iter(loader(data, n))) for n in (2, 1))
    )
    with torch.no_grad():
        torch.testing.assert_close(module(single)[0], module(both)[0])


def test_models_have_the_width_of_their_samples(small_folder, cache):
    sample = samples(small_folder, cache, "regionprops_small")[0]
    model = make_model(pretrained_feat_dim=8, additional_props="regionprops_small", **SMALL)
    assert model.config["feat_dim"] == sample["features"].shape[1]
    plain = make_model(ndim=3, **SMALL)
    assert (plain.config["coord_dim"], plain.config["feat_dim"]) == (3, 12)
    assert "pretrained_feat_dim" not in plain.config


pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*does not have many workers.*",  # Lightning's advice
        ".*isinstance.treespec, LeafSpec.*",  # Lightning with torch 2.15
        ".*The number of training batches.*",
        "Checkpoint directory .* exists",  # of the training that is resumed
        "unclosed file:ResourceWarning",  # Trackastra.from_folder
    )
]


def test_training_writes_the_model_of_the_best_validation_loss(small_folder, cache, tmp_path):
    torch.manual_seed(0)
    data = samples(small_folder, cache)
    model = make_model(pretrained_feat_dim=8, **SMALL)
    folder = tmp_path / "model"
    best = BestModel(folder, {"features": "pretrained_feats"})
    module = TrackingModule(model, epochs=3, warmup_epochs=1, learning_rate=1e-2)
    trainer(best).fit(module, loader(data), loader(data))
    written = yaml.safe_load((folder / "train_config.yaml").read_text())
    assert written.pop("features") == "pretrained_feats"
    assert ModelFeatures.of_model(written) == ModelFeatures.of_folder(folder)
    assert ModelFeatures.of_folder(folder) == ModelFeatures.of_data(data)
    again = TrackingTransformer.from_folder(folder)
    assert again.config == model.config
    found = trainer().validate(TrackingModule(again, epochs=1), loader(data), verbose=False)
    assert found[0]["val_loss"] == pytest.approx(best.best, rel=1e-5)


def test_a_resumed_training_keeps_a_better_model_of_before(small_folder, cache, tmp_path):
    data, folder = samples(small_folder, cache), tmp_path / "model"

    def run(epochs: int, **options) -> float:
        module = TrackingModule(make_model(pretrained_feat_dim=8, **SMALL), epochs=2)
        trainer(best := BestModel(folder, {}), epochs=epochs, **kept).fit(
            module, loader(data), loader(data), **options
        )
        return best.best

    kept = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    run(1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)
    state["callbacks"]["BestModel"]["best"] = 1e-9  # nothing that comes is as good
    torch.save(state, checkpoint)
    written = (folder / "model.pt").read_bytes()
    assert run(2, ckpt_path=str(checkpoint)) == 1e-9
    assert (folder / "model.pt").read_bytes() == written


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        (FakeBackbone(dim=8, seed=1), "on other features: weights differ: .* in training, .* now"),
        (None, "pretrained features of fake mean_patches_exact float16, and now there are none"),
    ],
)
def test_a_folder_of_other_features_is_refused_and_kept(
    small_folder, cache, tmp_path, backbone, says
):
    folder = tmp_path / "model"
    folder.mkdir()
    ModelFeatures.of_data(samples(small_folder, cache)).write(folder)
    before = (folder / "features.json").read_bytes()
    data = CTCData(str(small_folder()), window_size=3)
    if backbone is not None:
        data = wrap(data, cache, backbone)
    model = make_model(pretrained_feat_dim=0 if backbone is None else 8, **SMALL)
    with pytest.raises(BackboneError, match=says):
        trainer(BestModel(folder, {}), epochs=1).fit(
            TrackingModule(model, epochs=1), loader(data), loader(data)
        )
    assert [file.name for file in folder.iterdir()] == ["features.json"]
    assert (folder / "features.json").read_bytes() == before


def test_sets_of_different_features_are_refused(small_folder, cache):
    sets = [
        wrap(CTCData(str(small_folder()), window_size=3), cache, FakeBackbone(dim=8), dtype=dtype)
        for dtype in ("float16", "float32")
    ]
    with pytest.raises(BackboneError, match="dtype differs: float16 in one, float32 in another"):
        ModelFeatures.of_data(ConcatDataset(sets))


class Spoiled(TrackingModule):
    """Gives NaN in the first of some batches."""

    spoiled = 0

    def forward(self, batch):
        logits = super().forward(batch)
        if self.seen > self.spoiled or not self.training:
            return logits
        return logits * torch.nan


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("spoiled", [1, 2])
def test_batches_that_give_nan_are_skipped_and_counted(small_folder, cache, caplog, spoiled):
    model = make_model(pretrained_feat_dim=8, **SMALL)
    module, data = Spoiled(model, epochs=1), loader(samples(small_folder, cache))
    module.spoiled = spoiled
    fit = trainer(epochs=1, limit_val_batches=0)
    if 2 * spoiled > len(data):
        with pytest.raises(FloatingPointError, match=f"{spoiled} of {len(data)} batches give NaN"):
            fit.fit(module, data, data)
    else:
        fit.fit(module, data, data)
        assert f"1 of {len(data)} batches gave NaN in epoch 0 and were skipped" in caplog.text
        assert all(torch.isfinite(p).all() for p in module.parameters())


class SpoiledRank(TrackingModule):
    """Gives NaN on the second of two ranks, in validation too."""

    def forward(self, batch):
        return super().forward(batch) * (torch.nan if self.global_rank else 1)


def random_batches(count: int) -> DataLoader:
    return DataLoader([random_batch(seed)[1] for seed in range(count)], batch_size=None)


def fit_two_ranks() -> dict[str, float]:
    warnings.simplefilter("ignore")
    batches = random_batches(4)
    fit = trainer(epochs=1, devices=2, strategy="ddp_fork")
    fit.fit(SpoiledRank(make_model(**SMALL), epochs=1), batches, batches)
    return {name: float(value) for name, value in fit.callback_metrics.items()}


@pytest.mark.slow
def test_a_rank_whose_batches_all_give_nan_keeps_no_other_waiting():
    found = apart(fit_two_ranks)
    assert found["train_nan"] == 2
    assert math.isfinite(found["train_loss"])
    assert math.isfinite(found["val_loss"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_validation_of_nan_is_no_best(tmp_path):
    module = TrackingModule(make_model(**SMALL), epochs=1)
    module.model.register_forward_hook(
        lambda model, _, logits: logits if model.training else logits * torch.nan
    )
    fit = trainer(BestModel(tmp_path / "model", {}), epochs=1)
    fit.fit(module, random_batches(1), random_batches(1))
    assert fit.callback_metrics["val_loss"].isnan()
    assert not (tmp_path / "model" / "model.pt").exists()


def test_dropped_windows_tell_no_cells_apart_and_others_are_as_they_were():
    torch.manual_seed(0)
    features, padded = torch.rand(200, 7, 5), torch.zeros(200, 7, dtype=torch.bool)
    padded[:, 5:] = True
    features[padded] = 100.0
    batch = {"pretrained_feats": features, "padding_mask": padded}
    assert torch.equal(drop_features(batch, 0.0)["pretrained_feats"], features)
    found = drop_features(batch, 0.3)["pretrained_feats"]
    kept = (found == features).flatten(1).all(1)
    assert 0.2 < (~kept).float().mean() < 0.4
    mean = features[~padded].mean(dim=0)
    assert torch.equal(found[~kept], mean.expand(int((~kept).sum()), 7, 5))


def test_saving_again_leaves_no_other_files(tmp_path):
    model = make_model(**SMALL)
    save_model(model, tmp_path / "model")
    save_model(model, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.yaml", "model.pt"]


def test_a_model_without_its_package_says_how_to_get_it(monkeypatch):
    name = make_model.__module__
    monkeypatch.setitem(sys.modules, "trackastra_pretrained_feats", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match="--no-deps trackastra-pretrained-feats"):
        importlib.import_module(name)


def test_weights_and_biases_without_a_login_is_an_error_that_says_so(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # as where nobody could be asked
    options = parse_training(["--logger", "wandb", "--input_train", "01", "--input_val", "01"])
    with pytest.raises(ValueError, match=r"login.*WANDB_MODE=offline.*--logger csv"):
        make_trainer(options, tmp_path, {})
