"""Every experiment runs, stores, resumes and draws."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import mirrorflow.lab.framework as ex
from mirrorflow.lab.experiments.legendre_shapes import fig09_fig11_fig14_legendre as legendre
from mirrorflow.lab.framework.contract import Config

NAMES = list(ex.experiments())


# --- The contract, over all experiments -----------------------------------------------------------


def test_the_experiments_are_those_of_the_folder():
    assert {"fig02_matrix_sensing", "fig09_fig11_fig14_legendre"} <= set(NAMES)
    with pytest.raises(ValueError, match=r"experiment must be one of .*fig02_matrix.*got 'fig99'"):
        ex.load("fig99")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_a_smoke_run_are_complete(name, smoke):
    module, folder, result, curves = smoke(name)
    assert result["seconds"] > 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "metrics.jsonl", "result.json", "trajectory.npz",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert result["config"] == config and module.Config(**config) == module.Config.preset("smoke")
    assert (result["experiment"], result["hash"], result["status"]) == (
        name, folder.name, "completed",
    )  # fmt: skip
    assert len(folder.name) == 12 and folder.parent == smoke.out / name
    assert {"versions", "commit", "platform", "cpu", "device", "data"} <= set(result["meta"])
    for record in result["records"]:
        assert all(isinstance(v, str | int | float | None) for v in record.values()), record
    assert all(np.isfinite(v).all() for v in curves.values())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert folder in [r["folder"] for r in ex.find_results(smoke.out)]


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_is_not_computed_and_a_forced_one_is(name, smoke, tmp_path):
    module, folder, *_ = smoke(name)

    def computing(config, recorder):
        raise AssertionError("computed")

    copy = SimpleNamespace(NAME=name, Config=module.Config, run=computing)
    config = module.Config.preset("smoke")
    assert ex.execute(copy, config, smoke.out) == folder
    with pytest.raises(AssertionError, match="computed"):
        ex.execute(copy, config, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(8)
def test_every_axis_of_the_figure_holds_data(name, smoke):
    module, _, result, curves = smoke(name)
    figure = module.draw(result["records"], curves)
    assert len(figure.axes) >= 3 and any(axis.get_xlabel() for axis in figure.axes)
    for axis in figure.axes:
        points = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines])
        assert np.isfinite(points).any() and axis.get_ylabel(), axis.get_title()
    figure.draw_without_rendering()  # warnings are errors: a layout that does not fit fails here


@pytest.mark.parametrize("name", NAMES)
def test_charts_table_and_verdicts_come_from_the_records(name, smoke):
    module, _, result, curves = smoke(name)
    made = module.charts(result["records"], curves)
    assert made and all(isinstance(caption, str) for caption, _ in made)
    for _, chart in made:
        spec = chart.to_dict()
        layers = spec.get("layer", [spec])
        data = [layer.get("data", spec.get("data")) for layer in layers]
        values = [v["values"] if "values" in v else spec["datasets"][v["name"]] for v in data if v]
        assert values and all(len(rows) > 3 or "rule" in str(layers) for rows in values)
    rows = module.table(result["records"])
    assert len(rows) >= 3 and all(set(row) == set(rows[0]) for row in rows)
    verdicts = module.verdicts(result["records"])
    assert len(verdicts) >= 3 and len(dict(verdicts)) == len(verdicts)
    assert any(c.isdigit() for _, outcome in verdicts for c in outcome)
    assert all(len(outcome) < 200 for _, outcome in verdicts)
    assert module.TITLE and module.PAPER.startswith(("Figure", "Table", "Beyond"))


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_configurations_of_their_own(name):
    module = ex.load(name)
    for preset in ("smoke", "cpu", "full"):
        config = ex.config_from(module, preset)
        assert module.Config(**config.model_dump()) == config
    with pytest.raises(ValueError, match="preset must be one of smoke, cpu, full, got 'tiny'"):
        ex.config_from(module, "tiny")


def test_figures_are_imported_when_they_are_drawn():
    code = (
        "import sys, mirrorflow.lab.framework as ex\n"
        "for name in ex.experiments(): ex.load(name)\n"
        "print(*{m.split('.')[0] for m in sys.modules} & {'matplotlib', 'altair', 'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- The contract, in a toy -----------------------------------------------------------------------


class ToyConfig(Config):
    n: int = 3
    scale: float = 1.0

    @classmethod
    def preset(cls, name):
        return cls(n={"smoke": 2, "cpu": 3, "full": 9}[name])


class Toy:
    """Three parts; ``fails`` raises in the one of that number."""

    NAME, Config = "toy", ToyConfig

    def __init__(self):
        self.computed, self.fails, self.value = [], {}, 1.0

    def run(self, config, recorder):
        records = []
        for i in range(3):
            records += recorder.part(f"part{i}", lambda i=i: self.compute(i, recorder)).records
            recorder.progress(i + 1, 3, f"part{i}")
        return records

    def compute(self, i, recorder):
        recorder.log(step=i)
        if i in self.fails:
            raise self.fails[i]
        self.computed.append(i)
        return ex.Part([{"i": i, "value": self.value}], {"curve": np.arange(3.0) + i}, f"data{i}")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("no memory")])
def test_a_run_that_was_killed_continues_behind_its_finished_parts(tmp_path, failure):
    toy, whole, seen = Toy(), Toy(), []
    toy.fails = {2: failure}
    with pytest.raises(type(failure)):
        ex.execute(toy, ToyConfig(), tmp_path)
    folder = ex.result_folder(toy, ToyConfig(), tmp_path)
    assert toy.computed == [0, 1] and not (folder / "result.json").exists()
    assert ex.find_results(tmp_path) == []
    interrupted = isinstance(failure, KeyboardInterrupt)
    assert (folder / "failure.json").exists() != interrupted
    if not interrupted:
        reason = json.loads((folder / "failure.json").read_text())["reason"]
        assert reason == "RuntimeError: no memory"
    with (folder / "metrics.partial.jsonl").open("a") as log:
        log.write('{"part": "part0", "cut": ')  # a kill in the middle of a line
    stored = folder / "parts" / "part0.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"seconds": 1000.0}))
    toy.fails = {}
    assert ex.execute(toy, ToyConfig(), tmp_path, progress=lambda *p: seen.append(p)) == folder
    assert toy.computed == [0, 1, 2] and seen[-1] == (3, 3, "part2")
    ex.execute(whole, ToyConfig(), tmp_path / "whole")
    again, once = ex.find_results(tmp_path)[0], ex.find_results(tmp_path / "whole")[0]
    assert (again["records"], again["meta"]) == (once["records"], once["meta"])
    assert again["seconds"] > 1000 > once["seconds"]  # those of the stored part are added
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"part": f"part{i}", "step": i} for i in range(3)]
    np.testing.assert_array_equal(ex.trajectory(folder)["part2/curve"], [2, 3, 4])
    left = {p.name for p in folder.iterdir()}
    assert left == {"config.json", "metrics.jsonl", "result.json", "trajectory.npz"}


@pytest.mark.parametrize("name", ["part0.json", "part0.npz"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"records": []}', b"PK broken"])
def test_a_part_that_is_broken_is_computed_again(tmp_path, name, content):
    toy, whole = Toy(), Toy()
    toy.fails = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        ex.execute(toy, ToyConfig(), tmp_path)
    folder = ex.result_folder(toy, ToyConfig(), tmp_path)
    (folder / "parts" / name).write_bytes(content)
    toy.fails = {}
    ex.execute(toy, ToyConfig(), tmp_path)
    assert toy.computed == [0, 1, 0, 2]
    ex.execute(whole, ToyConfig(), tmp_path / "whole")
    again, once = ex.find_results(tmp_path)[0], ex.find_results(tmp_path / "whole")[0]
    assert again["records"] == once["records"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["part"] for line in lines) == ["part0", "part1", "part2"]


def test_the_log_can_be_read_while_the_run_is_going_on(tmp_path):
    toy, read = Toy(), []
    folder = ex.result_folder(toy, ToyConfig(), tmp_path)
    compute = toy.compute

    def watched(i, recorder):
        part = compute(i, recorder)
        read.append((folder / "metrics.partial.jsonl").read_text().count("\n"))
        return part

    toy.compute = watched
    ex.execute(toy, ToyConfig(), tmp_path)
    assert read == [1, 2, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_a_failure_and_the_next_run_tries_again(tmp_path, bad):
    toy = Toy()
    toy.value = bad
    with pytest.raises(ArithmeticError, match="part0: value = "):
        ex.execute(toy, ToyConfig(), tmp_path)
    folder = ex.result_folder(toy, ToyConfig(), tmp_path)
    assert "value = " in json.loads((folder / "failure.json").read_text())["reason"]
    toy.value = 2.0
    ex.execute(toy, ToyConfig(), tmp_path)
    assert not (folder / "failure.json").exists() and toy.computed == [0, 0, 1, 2]
    ex.execute(toy, ToyConfig(), tmp_path, force=True)
    assert toy.computed == [0, 0, 1, 2, 0, 1, 2]


def test_the_hash_is_that_of_the_whole_configuration(tmp_path):
    toy = Toy()
    one, same = (ex.result_folder(toy, ToyConfig(), tmp_path / d).name for d in "ab")
    assert one == same
    changed = [ToyConfig(n=4), ToyConfig(scale=2.0)]
    assert len({one, *(ex.result_folder(toy, c, tmp_path).name for c in changed)}) == 3


def test_a_configuration_is_preset_then_file_then_overrides(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text("n = 7\nscale = 0.5\n")
    toy = Toy()
    assert ex.config_from(toy, "smoke") == ToyConfig(n=2)
    assert ex.config_from(toy, "smoke", path) == ToyConfig(n=7, scale=0.5)
    assert ex.config_from(toy, "smoke", path, {"n": 1}) == ToyConfig(n=1, scale=0.5)
    path.write_text("sclae = 1.0\n")
    with pytest.raises(ValueError, match=r"unknown key 'sclae' in .*toy.toml; allowed are: n, sca"):
        ex.config_from(toy, "smoke", path)
    with pytest.raises(ValueError, match=r"unknown key 'seeds' in the overrides"):
        ex.config_from(toy, overrides={"seeds": [1]})
    with pytest.raises(ValueError, match="toy: n: Input should be a valid integer"):
        ex.config_from(toy, overrides={"n": "many"})
    path.write_text("n = \n")
    with pytest.raises(ValueError, match="is not TOML"):
        ex.config_from(toy, "smoke", path)


# --- The shapes of R_a ----------------------------------------------------------------------------


def numbers(smoke, case):
    _, _, result, curves = smoke("fig09_fig11_fig14_legendre")
    stored = {k.split("/")[1]: v for k, v in curves.items() if k.startswith(f"{case}/")}
    return [r for r in result["records"] if r["case"] == case], stored


def test_the_speed_near_zero_falls_as_theory_md_says(smoke):
    records, _ = numbers(smoke, "power")
    assert [r["a"] for r in records] == [0.0, -0.1, -1.0, -10.0]
    speeds = [r["inverse_metric"] for r in records]
    np.testing.assert_allclose(speeds, [4.9, 1.6, 0.031, 5.8e-5], rtol=0.03)


@pytest.mark.parametrize("case", ["power", "log", "hadamard", "one_sided"])
def test_the_curves_belong_together_and_meet_the_integrated_flow(case, smoke):
    records, stored = numbers(smoke, case)
    x = stored["x"]
    for i, record in enumerate(records):
        assert record["flow_off"] < 1e-9
        assert record["gradient_at_start"] == pytest.approx(0, abs=1e-12) or record["a"] < 0
        # The value is the integral of the gradient, whose slope is the metric.
        rise = np.diff(stored["value"][i])
        low, high = stored["gradient"][i][:-1] * np.diff(x), stored["gradient"][i][1:] * np.diff(x)
        assert (low <= rise + 1e-12).all() and (rise <= high + 1e-12).all()
        assert stored["value"][i].min() >= -1e-13
    growth = [r["growth"] for r in records]
    assert growth == sorted(growth, reverse=True) and 1 < growth[-1] < growth[0] < 2


def test_the_printed_formulas_are_drawn_where_they_differ(smoke):
    for case, printed in (("hadamard", True), ("one_sided", True), ("log", True), ("power", False)):
        records, stored = numbers(smoke, case)
        assert stored["printed_exists"].all() == printed
        assert all(r["printed_off"] is None or r["printed_off"] > 0.1 for r in records if r["a"])
    _, one_sided = numbers(smoke, "one_sided")
    np.testing.assert_allclose(one_sided["printed"], 2 * one_sided["gradient"], atol=1e-12)
    x, start = np.linspace(-1, 1, 9), (0.8, 0.6)
    mu = legendre.printed_power(x, -0.1, start)
    c, cu, cv = 8, 0.8**-2 / 8, 0.6**-2 / 8
    back = (c * (cu + mu - 0.1)) ** -2.0 - (c * (cv - mu - 0.1)) ** -2.0
    np.testing.assert_allclose(back, x, atol=1e-10)
    assert (np.diff(mu) < 0).all()  # it falls: the sign of mu is wrong
    assert np.isnan(legendre.printed_power(x, -1.0, start)).all()
    np.testing.assert_allclose(
        legendre.printed_log(x, 0.0, start), numbers_at_zero(x, start), atol=1e-13
    )


def numbers_at_zero(x, start):
    """The gradient of R_0 of log u - log v, from u^2 = u0^2 + 2 mu, v^2 = v0^2 - 2 mu."""
    u2, v2 = start[0] ** 2, start[1] ** 2
    ratio = np.exp(2 * x)  # (u2 + 2 mu) / (v2 - 2 mu)
    return (ratio * v2 - u2) / (2 * (1 + ratio))


def test_a_above_zero_is_refused():
    with pytest.raises(ValueError, match="a must be <= 0"):
        ex.config_from(ex.load("fig09_fig11_fig14_legendre"), overrides={"log_a": [0.1]})
