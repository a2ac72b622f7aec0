"""Networks in training: what branches share, what a budget is, what the data are."""

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

import mirrorflow.lab.framework as ex
from mirrorflow.lab.experiments.networks import _charts as _network_charts
from mirrorflow.lab.experiments.networks import _figures as _network_figures
from mirrorflow.lab.experiments.networks import _language, _vision  # fmt: skip
from mirrorflow.lab.experiments.networks import _study as _networks
from mirrorflow.lab.experiments.networks import tab02_fig03b_fig13_vit as tab02
from mirrorflow.lab.experiments.networks import tab03_fig03a_lora as tab03
from mirrorflow.lab.experiments.networks._study import Study, absorbed, compared, interval
from mirrorflow.lab.experiments.networks._training import train
from mirrorflow.lab.framework import download as _download
from mirrorflow.lab.framework.trunks import Checkpoints, branch_points, steps_saved

MODULES = {m.NAME: m for m in (tab02, tab03)}
BUILD = {
    tab02.NAME: lambda config, key, store: tab02._session(config, config.plans()[key]),
    tab03.NAME: lambda config, key, store: tab03._building(config, key, store)(),
}


def state_of(session):
    return {name: p.detach() for name, p in session.model.named_parameters() if p.requires_grad}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(params=list(MODULES))
def module(request):
    return MODULES[request.param]


def whole(module, config, key, store, **options):
    return train(
        lambda: BUILD[module.NAME](config, key, store),
        module.timelines(config)[key],
        store,
        **options,
    )


@pytest.mark.sample(1)
def test_a_branch_is_bit_for_bit_the_run_that_was_not_shared(module, tmp_path):
    config = module.Config.preset("smoke")
    lines = module.timelines(config)
    keep = branch_points(lines)
    kinds = ("constant", "off", "time")
    runs = {kind: next(k for k in lines if k.startswith(f"{kind}-")) for kind in kinds}
    shared, alone = Checkpoints(tmp_path / "shared"), Checkpoints(tmp_path / "alone")
    trunk = whole(module, config, runs["constant"], shared, keep=keep[runs["constant"]])
    for kind in ("off", "time"):
        start, _ = shared.latest(lines[runs[kind]])
        assert start == config.plans()[runs[kind]].off  # it goes on from the trunk
        branch = whole(module, config, runs[kind], shared)
        once = whole(module, config, runs[kind], alone)
        assert same(state_of(branch), state_of(once))
        assert branch.curves == once.curves and branch.decay.accumulated == once.decay.accumulated
        assert not same(state_of(branch), state_of(trunk))


@pytest.mark.parametrize("kind", ["off", "hold", "level"])
@pytest.mark.sample(3)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(module, kind, tmp_path):
    config = module.Config.preset("smoke")
    key = next(k for k in module.timelines(config) if k.startswith(kind))
    store = Checkpoints(tmp_path)
    module.advance(config, key, 13, store)
    assert store.has(module.timelines(config)[key], 13)
    resumed = whole(module, config, key, store)
    once = whole(module, config, key, Checkpoints(tmp_path / "once"))
    assert same(state_of(resumed), state_of(once)) and resumed.curves == once.curves
    if kind != "off":
        assert str(resumed.decay.schedule.log) == str(once.decay.schedule.log) != "[]"


def test_a_long_run_stores_its_state_now_and_then_and_only_the_last(module, tmp_path, monkeypatch):
    monkeypatch.setattr("mirrorflow.lab.experiments.networks._training.STORED", -1.0)
    config = module.Config.preset("smoke")
    key = next(iter(config.plans()))
    store, seen = Checkpoints(tmp_path), []

    def watch(step, found):
        seen.append(len(list(tmp_path.glob("*.pt"))))
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole(module, config, key, store, watch=watch)
    assert store.latest(module.timelines(config)[key])[0] == 16
    assert max(seen) <= 2  # with the pretraining's
    monkeypatch.setattr("mirrorflow.lab.experiments.networks._training.STORED", 60.0)
    resumed = whole(module, config, key, store)
    once = whole(module, config, key, Checkpoints(tmp_path / "once"))
    assert same(state_of(resumed), state_of(once))


@pytest.mark.sample(1)
def test_runs_at_equal_budget_have_absorbed_the_same(module, tmp_path):
    """The ledger, which follows the momentum, is the oracle of `absorbed`."""
    config = module.Config.preset("smoke").model_copy(update={"seeds": (0,)})
    folder = ex.execute(module, config, tmp_path)
    records = ex.find_results(tmp_path)[0]["records"]
    ends = {(r["family"], r["kind"]): r["budget"] for r in records}
    for family in config.decays:
        assert ends[family, "budget"] == pytest.approx(ends[family, "off"], rel=1e-9)
        assert ends[family, "constant"] == pytest.approx(2 * ends[family, "half"], rel=1e-9)
        assert ends[family, "off"] < ends[family, "constant"]
    assert (folder / "result.json").exists()


def test_absorbed_is_what_a_buffer_with_momentum_adds_up():
    lrs, momentum = np.full(7, 0.25), 0.5
    found = absorbed(lrs, momentum)
    for t in range(7):
        buffer, total = 0.0, 0.0
        for s in range(7):
            buffer = momentum * buffer + (s == t)
            total += lrs[s] * buffer
        assert found[t] == pytest.approx(total)
    np.testing.assert_allclose(absorbed(np.array([0.1, 0.3])), [0.1, 0.3], rtol=1e-14)


def test_sharing_saves_the_steps_before_the_switches():
    config = tab02.Config(decays=(0.2, 0.02), times=(9_750, 29_250), seeds=(0,))
    alone, shared = steps_saved(tab02.timelines(config))
    assert alone == 11 * config.steps
    assert alone - shared == 2 * config.off + 9_750 + 29_250


def test_the_six_runs_of_the_paper_are_there():
    for module, rates in ((tab02, (0.2, 0.1, 0.02, 0.01)), (tab03, (1.0, 0.5, 0.2, 0.1))):
        full = module.Config.preset("full")
        chosen = [p for p in full.plans().values() if p.seed == 0]
        paper = [(p.rate, p.off) for p in chosen if p.kind in ("constant", "off", "half")]
        high, half, low, quarter = rates
        expected = [(high, None), (high, full.off), (half, None),
                    (low, None), (low, full.off), (quarter, None)]  # fmt: skip
        assert paper == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [({"off": 20}, "within the 20 steps"), ({"times": (0,)}, "within the 20 steps")],
)
def test_a_switch_outside_of_the_run_is_refused(module, change, message):
    with pytest.raises(ValueError, match=message):
        ex.config_from(module, "smoke", None, change)


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch must divide size"):
        ex.config_from(tab02, "smoke", None, {"patch": 3})


def test_a_loss_that_is_not_finite_fails_with_its_step(tmp_path):
    config = ex.config_from(tab03, "smoke", None, {"lr": 1e6, "seeds": (0,)})
    with (
        pytest.warns(UserWarning, match=r"lr \* weight_decay = \d+ >= 1"),  # which is why
        pytest.raises(ArithmeticError, match=r"training loss is (nan|inf) in step"),
    ):
        ex.execute(tab03, config, tmp_path)


def test_the_learning_rate_is_that_of_torch():
    config = tab02.Config(steps=50, off=25, warmup=10)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=config.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (t + 1) / 10 if t < 10 else (1 + math.cos(math.pi * (t - 10) / 40)) / 2,
    )
    found = []
    for _ in range(50):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(config.lrs(), found, rtol=1e-12)


# --- Comparing ------------------------------------------------------------------------------------


def test_intervals_are_those_of_student():
    rng = np.random.default_rng(0)
    records = [
        {"family": 1.0, "kind": kind, "seed": s, "loss": float(rng.normal(mean, 0.1)),
         "diverged": False}
        for kind, mean in (("constant", 3.0), ("off", 2.0), ("half", 2.05), ("budget", 1.0))
        for s in range(5)
    ]  # fmt: skip
    found = {c["against"]: c for c in compared(Study("loss", "loss", -1, {}), records)}
    by = {k: [r["loss"] for r in records if r["kind"] == k] for k in ("off", *found)}
    for kind, entry in found.items():
        low, high = ttest_rel(by[kind], by["off"]).confidence_interval()
        assert (entry["gain"] - entry["width"], entry["gain"] + entry["width"]) == pytest.approx(
            (low, high)
        )
        assert entry["clear"] == (low > 0) and entry["holds"] == (entry["gain"] > 0)
    assert found["constant"]["clear"] and not found["budget"]["holds"]
    assert interval([2.0]) == (2.0, 0.0)


# --- Data -----------------------------------------------------------------------------------------


def ended(kind, loss, seed=0, decay=0.1, start=4.0):
    """Return the record of a run that has ended with a loss."""
    curves = {"loss": np.array([start, loss])}
    return {
        "run": f"{kind}", "part": f"{kind}-seed{seed}", "kind": kind, "family": decay,
        "decay": decay, "off": None, "seed": seed, "budget": 1.0, "ratio": 1.5, "loss": loss,
        "diverged": _networks.diverged(curves),
    }  # fmt: skip


LOSS = _networks.Study("loss", "validation loss", -1, {}, "nothing")


def test_nothing_follows_from_runs_that_diverged():
    kinds = {"constant": 3.0, "off": 2.8, "half": 2.9, "budget": 2.85, "none": 9.0}
    records = [ended(kind, loss) for kind, loss in kinds.items()]
    assert [r["diverged"] for r in records] == [False] * 4 + [True]
    found = {c["against"]: c["diverged"] for c in _networks.compared(LOSS, records)}
    assert found == {"constant": False, "half": False, "budget": False, "none": True}
    told = dict(_network_figures.verdicts(LOSS, records))
    claim = "Decay 0.1 switched off ends better than kept, and than half of it"
    assert told[claim] == "holds in its one seed"
    assert told["Decay 0.1: gain against keeping it"] == "+0.2"
    assert "nothing follows" in told["Decay 0.1: against no decay at all"]
    assert "-6" not in str(told) and told["Best of all runs"].startswith("decay off")
    table = {row["decay"]: row["what"] for row in _network_figures.rows(LOSS, records)}
    assert table["none"] == "no decay at all (1 of 1 diverged)"
    assert table["off"] == "switched off"


def test_runs_that_diverged_do_not_hide_the_others():
    records = [
        ended("constant", 3.9), ended("off", 3.7), ended("half", 9.0), ended("none", 3.6),
    ]  # fmt: skip
    spec = _network_charts._scatter(LOSS, records).to_dict()
    low, high = spec["encoding"]["y"]["scale"]["domain"]
    assert 3.5 < low < 3.6 and 3.9 < high < 4.0
    colours = spec["encoding"]["color"]["scale"]
    assert dict(zip(colours["domain"], colours["range"], strict=True))["none"] == (
        _network_figures.NONE  # it belongs to no family of decays
    )
    axis = Figure().subplots()
    _network_figures._draw_ends(axis, LOSS, records)
    low, high = axis.get_xlim()
    assert 3.5 < low < 3.6 and 3.9 < high < 4.0


def test_runs_are_told_apart_without_colour():
    runs = [(f, k) for f in (0.1, 0.02) for k in ("constant", "off", "half", "budget")]
    runs += [(0.1, kind) for kind in ("none", "time", "time", "time", "hold", "level")]
    looks = [
        (
            round(10 * np.dot(to_rgb(colour), (0.299, 0.587, 0.114))),  # lightness
            tuple(_network_charts.PATTERNS[kind]),
        )
        for (_, kind), colour in zip(runs, _network_charts._colours(runs), strict=True)
    ]
    assert len(set(looks)) == len(looks)


def test_a_switched_off_run_that_diverged_is_not_judged():
    records = [ended(k, v) for k, v in {"constant": 3.0, "off": 7.0, "half": 2.9}.items()]
    (_, judged), (against, note), *_ = _network_figures.verdicts(LOSS, records)
    assert judged == "cannot be judged" and note.startswith("runs diverged")
    assert against == "Decay 0.1: against keeping it, half of it"
    lost = _network_figures.verdicts(LOSS, [ended("off", 7.0), ended("half", 8.0)])
    assert dict(lost)["Best of all runs"] == "every run has diverged"


def test_windows_of_text_are_a_function_of_seed_and_step():
    tokens = _language.Tokens(np.arange(1000), 8)
    one, two = tokens.batch(3, 5, 4), tokens.batch(3, 5, 4)
    assert torch.equal(one, two) and not torch.equal(one, tokens.batch(3, 6, 4))
    assert one.shape == (4, 9) and int(one.max()) < 900  # the training part
    held = tokens.validation(6)
    assert int(held.min()) >= 900 and len(held) == 6
    with pytest.raises(ValueError, match="too few for the window"):
        _language.Tokens(np.arange(50), 8).validation(2)


def test_the_loss_over_windows_does_not_depend_on_the_batch():
    model, encode = _language.own_model(16, 1, 2, 16, seed=0)
    windows = _language.Tokens(encode("To be, or not to be: é " * 40), 16).validation(7)
    assert _language.mean_loss(model, windows, 2) == pytest.approx(
        _language.mean_loss(model, windows, 7), rel=1e-6
    )


def test_a_text_that_is_not_at_hand_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORFLOW_DATA", str(tmp_path))

    def refused(*args):
        raise OSError("no network")

    monkeypatch.setattr(_download.urllib.request, "urlretrieve", refused)
    with pytest.raises(OSError, match="put it there, or set MIRRORFLOW_DATA"):
        _language.text("tiny_shakespeare")
    (tmp_path / "tinyshakespeare.txt").write_text("Now is the winter")
    assert _language.text("tiny_shakespeare") == "Now is the winter"
    assert _language.text(str(tmp_path / "tinyshakespeare.txt")) == "Now is the winter"


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORFLOW_DATA", str(tmp_path))
    (tmp_path / "source").write_text("changed")
    source = (tmp_path / "source").as_uri()
    with pytest.raises(ValueError, match="the file has changed"):
        _download.data_file("text.txt", source, "0" * 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".text.txt.lock", "source"]
    assert _download.data_file("text.txt", source).read_text() == "changed"


def pictures(folder, sizes=((12, 12), (20, 9))):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                grey = rng.integers(0, 80, (*sizes[i % 2][::-1], 3)) + 160 * label
                image = Image.fromarray(grey.astype(np.uint8))
                image.save(folder / part / name / f"{i}.png")


def test_a_folder_of_images_trains_with_the_same_code(tmp_path):
    pictures(tmp_path / "images")
    config = ex.config_from(
        tab02, "smoke", None,
        {"data": str(tmp_path / "images"), "batch": 4, "constant": True, "lr": 1e-2,
         "validation": 0, "augment": True, "seeds": (0,), "times": (), "loops": False},
    )  # fmt: skip
    ex.execute(tab02, config, tmp_path / "runs")
    records = ex.find_results(tmp_path / "runs")[0]["records"]
    assert max(r["accuracy"] for r in records) == 100  # dark ants, bright bees


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images: expected .*<class>/<image>"):
        _vision.images(str(tmp_path), 8)


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_shows_each_image_once_and_depends_on_seed_and_step_alone(augment):
    training, _ = _vision.images("digits", 8)
    steps = len(training.labels) // 64
    labels = torch.cat([training.batch(1, s, 64, augment)[1] for s in range(steps)])
    chosen = _vision._order(len(training.labels), 1, 0)[: steps * 64]
    assert len(set(chosen.tolist())) == steps * 64
    np.testing.assert_array_equal(labels, training.labels[chosen])
    one, two = training.batch(1, 3, 64, augment)[0], training.batch(1, 3, 64, augment)[0]
    assert torch.equal(one, two) and one.shape == (64, 3, 8, 8)
    assert float(one.min()) >= -1 and float(one.max()) <= 1
    assert not torch.equal(one, training.batch(1, 3 + steps, 64, augment)[0])
    with pytest.raises(ValueError, match="larger than"):
        training.batch(0, 0, 5000, augment)


def test_moved_images_are_the_images_moved():
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    found = _vision._moved(pixels, rng)
    down, right = again.integers(0, 9, (2, 2))
    mirrored = again.random(2) < 0.5
    for i in range(2):
        wide = np.pad(pixels[i], ((4, 4), (4, 4), (0, 0)))
        cut = wide[down[i] : down[i] + 8, right[i] : right[i] + 8]
        np.testing.assert_array_equal(found[i], cut[:, ::-1] if mirrored[i] else cut)


def test_biases_norms_and_positions_do_not_decay():
    model = _vision.vit("own", 8, 4, 16, 2, 2, 10, seed=0)
    decaying, rest = _vision.parameter_groups(model, 0.3)
    assert decaying["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    counted = len(decaying["params"]) + len(rest["params"])
    assert counted == len(list(model.parameters()))
    assert all(p.ndim >= 2 for p in decaying["params"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert any("projection" in names[id(p)] for p in decaying["params"])
    assert any("position" in names[id(p)] for p in rest["params"])


def test_a_seed_gives_the_same_start_and_leaves_the_global_one_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two = (_vision.vit("own", 8, 4, 16, 2, 2, 10, seed=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
