"""Mistakes in saved optimizers, wherever they lie in a file, and files that cannot be read."""

import argparse
import collections
import io
import pickle
import pickletools
import random

import numpy as np
import pytest
import torch

from mirrorflow._pickle_protocol import _rewritten
from mirrorflow.weightdecay import coupling, lint_file

OPTIMIZERS = (
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam",
    "RAdam", "RMSprop", "SGD",
)  # fmt: skip
CODE = {"coupled": ["coupled"], "sgd": ["coupled"], "decoupled": []}


def made(name="AdamW", **settings):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    return getattr(torch.optim, name)([weight], **({"lr": 0.1, "weight_decay": 0.1} | settings))


def state(name="AdamW", **settings):
    return made(name, **settings).state_dict()


def with_decay(value):
    saved = state()
    saved["param_groups"][0]["weight_decay"] = value
    return saved


@pytest.fixture
def looked_at(tmp_path):
    """Save something, and give what lint_file finds in it."""

    def look(content, **options):
        torch.save(content, tmp_path / "saved.pt", **options)
        return lint_file(tmp_path / "saved.pt")

    return look


def codes(found):
    return [f.code for f in found]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_kind_that_the_keys_tell_is_the_one_that_the_optimizer_shows(name, looked_at):
    optimizer = made(name, **({"momentum": 0.9} if name == "SGD" else {}))
    kind = coupling(optimizer, optimizer.param_groups[0])
    assert codes(looked_at(optimizer.state_dict())) == CODE[kind]


def test_every_optimizer_of_torch_that_decays_is_among_them():
    known = {
        name
        for name in torch.optim.__all__
        if isinstance(kind := getattr(torch.optim, name), type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
        and name not in ("LBFGS", "SparseAdam", "Rprop")  # these have no weight decay
    }
    assert known == set(OPTIMIZERS)


def test_the_adafactor_of_transformers_is_known(looked_at):
    transformers = pytest.importorskip("transformers")
    weights = torch.nn.Linear(3, 3).parameters()
    optimizer = transformers.Adafactor(
        weights, lr=0.1, scale_parameter=False, relative_step=False, weight_decay=0.1
    )
    assert coupling(optimizer, optimizer.param_groups[0]) == "decoupled"
    assert codes(looked_at(optimizer.state_dict())) == []


def test_an_unknown_coupling_is_a_note(looked_at):
    saved = state()
    del saved["param_groups"][0]["decoupled_weight_decay"]  # as AdamW was saved before torch 2.6
    (found,) = looked_at(saved)
    assert (found.code, found.level) == ("unknown-coupling", "note")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_a_number_of_numpy_is_a_finding_and_not_damage(kind, zipped, looked_at):
    saved = with_decay(kind(1))
    (found,) = looked_at(saved, _use_new_zipfile_serialization=zipped)
    assert found.code == "numpy-scalar" and f"NumPy {kind.__name__}" in found.message


def test_the_users_own_list_of_safe_classes_stays_as_it_was(looked_at):
    torch.serialization.add_safe_globals([np.dtype])
    try:
        before = set(torch.serialization.get_safe_globals())
        looked_at(with_decay(np.float64(0.1)))
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_an_optimizer_is_read_whatever_pickle_protocol_wrote_it(protocol, zipped, looked_at):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1), weight_decay=0.1)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    saved = optimizer.state_dict()
    group = {**saved["param_groups"][0], "weight_decay": np.float64(0.1)}
    whole = collections.OrderedDict(
        numbers=[1, -(2**70), 2**31, 1e-300, True, None, (1, 2, 3, 4), ()], text="é\n" * 200,
        first=saved, again=saved, second={"param_groups": [group]},
    )  # fmt: skip
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    found = looked_at(whole, **options)
    assert codes(found) == ["coupled"] * 3 + ["numpy-scalar"]
    for other in ({"param_groups": []}, saved["param_groups"], Trap(), {"x": {1, 2}, **saved}):
        with pytest.raises(ValueError, match=r"saved\.pt"):
            looked_at({"optimizer": other, "trap": Trap()}, **options)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_rewritten_pickles_hold_what_was_pickled(protocol):
    random.seed(protocol)

    def value(depth=4):
        kind = random.randrange(9 if depth else 6)
        if kind > 5:
            inner = [value(depth - 1) for _ in range(random.choice([0, 1, 2, 3, 5]))]
            keyed = {random.choice("abcé"): one for one in inner}
            return {6: inner, 7: tuple(inner), 8: keyed}[kind]
        return random.choice([None, True, False, -1, 0, 255, 256, 65536, -(2**31), 2**31, -(2**90),
                              0.1, -1e308, "", "a", "é\n", "q" * 300, b"", b"\x00\xff" * 200,
                              np.float64])  # fmt: skip

    for _ in range(200):
        content = [shared := value(), shared, value(), "a", "a"]
        text = pickle.dumps(content, protocol=protocol)
        again = _rewritten(io.BytesIO(text))
        assert pickle.loads(again) == content
        assert max(code.proto for code, *_ in pickletools.genops(again)) <= 2


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"args": argparse.Namespace(lr=1), "optimizer": state()}, "argparse.Namespace"),
        ({"optimizer": made("Adam")}, "torch.optim.adam.Adam"),
        ({"history": np.array([None], dtype=object), "optimizer": state()}, "ObjectDType"),
    ],
    ids=["settings", "a whole optimizer", "objects in an array"],
)
def test_objects_of_other_classes_are_named(content, name, zipped, tmp_path):
    path = tmp_path / "saved.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"because it holds .*{name}: save plain") as caught:
        lint_file(path)
    assert "weights_only=False" not in str(caught.value) and "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('it was run')",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_nothing_in_a_file_is_run(protocol, zipped, tmp_path):
    path, content = tmp_path / "saved.pt", {"optimizer": state(), "x": Trap()}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(content, path, **options)
    with pytest.raises(ValueError, match="exec"):
        lint_file(path)


@pytest.mark.parametrize(
    ("content", "sources"),
    [
        ({"optim": state("Adam")}, [""]),
        ({"state_dict": {}, "optimizer_states": [state(), state("Adam")]}, ["optimizer_states[1]"]),
        (
            {"optimizers": {"a": state("Adam"), "b": [state("RMSprop")]}},
            ["optimizers.a", "optimizers.b[0]"],
        ),
    ],
    ids=["alone", "Lightning", "by name"],
)
def test_all_optimizers_of_a_checkpoint_are_looked_at(content, sources, looked_at):
    found = looked_at(content)
    assert [f.source for f in found] == sources and set(codes(found)) == {"coupled"}
    assert str(found[-1]).startswith(f"coupled ({sources[-1]}{', ' if sources[-1] else ''}group 0)")


def test_a_checkpoint_of_the_trainer_is_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a folder without optimizer\*\.pt"):
        lint_file(tmp_path)
    torch.save(state("Adam"), tmp_path / "optimizer.pt")
    torch.save({"not": "an optimizer"}, tmp_path / "scheduler.pt")
    assert [str(f)[:18] for f in lint_file(tmp_path)] == ["coupled (group 0):"]
    torch.save(state("Adam"), tmp_path / "optimizer_1.bin")  # as accelerate names the second
    assert [f.source for f in lint_file(tmp_path)] == ["optimizer.pt", "optimizer_1.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"param_groups": [1, 2]}, r"must be a list of parameter groups, got \[1, 2\]"),
        ({"optimizer": {"param_groups": 3}}, r"optimizer\.param_groups must be a list"),
        (with_decay(None), "group 0: weight_decay must be a finite number >= 0, got None"),
        (with_decay("x"), "got 'x'"),
        (with_decay(torch.ones(2)), "got tensor"),
        ({"model": torch.ones(2)}, "no param_groups"),
        (torch.ones(2), "no param_groups"),
    ],
)
def test_a_file_without_optimizer_state_is_refused(content, message, looked_at):
    with pytest.raises(ValueError, match=message):
        looked_at(content)


def test_a_decay_in_a_tensor_is_a_number(looked_at):
    assert looked_at(with_decay(torch.tensor(0.1))) == []


def test_damaged_files_are_reported_as_damaged(tmp_path):
    path = tmp_path / "saved.pt"
    torch.save(state(), path)
    whole = path.read_bytes()
    plain = pickle.dumps(state())
    larger = tmp_path / "larger.pt"
    torch.save([state(), torch.zeros(3000)], larger)
    long = larger.read_bytes()  # torch seeks to before its beginning, if it is cut
    parts = (whole[: len(whole) // 2], plain[: len(plain) // 2], long[: len(long) // 2])
    for content in (b"", b"hello", *parts):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged") as caught:
            lint_file(path)
        assert "weights_only=False" not in str(caught.value)
        assert str(path) in str(caught.value) and not str(caught.value).endswith(": ")
    with pytest.raises(FileNotFoundError):
        lint_file(tmp_path / "none")
