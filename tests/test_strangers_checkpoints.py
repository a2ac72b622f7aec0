"""Checkpoints by strangers: types, sizes and places are checked, and patterns cannot hang."""

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch

from mirrorflow.spectrum import SpectralTracker, audit, plan_truncation
from mirrorflow.spectrum._patterns import Patterns
from mirrorflow.weightdecay import lint_file

safetensors = pytest.importorskip("safetensors.torch")


def folder(path, config=None, adapter=None, **weights):
    """Write a checkpoint: a LoRA update, an attention layer, and other weights."""
    if not weights:
        weights = {
            "base_model.model.layers.0.q.lora_A.weight": torch.eye(2, 4),
            "base_model.model.layers.0.q.lora_B.weight": torch.eye(4, 2),
            "layers.0.self_attn.q_proj.weight": torch.eye(4),
            "layers.0.self_attn.k_proj.weight": torch.eye(4),
        }
    path.mkdir(exist_ok=True)
    safetensors.save_file(weights, path / "model.safetensors")
    for name, content in (("config.json", config), ("adapter_config.json", adapter)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name).write_text(text)
    return path


def scale(found):
    return next(record.scale for record in found.records if record.kind == "lora")


# --- Patterns -------------------------------------------------------------------------------------

SLOW = ("(a+)+x", "(a|a)*x", "a?" * 30 + "a" * 30 + "x", "((((a?)*)*)*)*x", "(.*.*.*.*)*x",
        "(a{1000}){1000}", "(a|aa)+$b", ".*a.*a.*a.*a.*a.*a.*x")  # fmt: skip


def expression(depth=3):
    """Draw a regular expression without memory."""
    kind = random.random()
    if depth == 0 or kind < 0.4:
        return random.choice(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", "q_", "^", "$", r"\b"])
    if kind < 0.6:
        return expression(depth - 1) + expression(depth - 1)
    if kind < 0.75:
        opened = random.choice(["(", "(?:"])
        return f"{opened}{expression(depth - 1)}|{expression(depth - 1)})"
    repeat = random.choice(["*", "+", "?", "{2}", "{1,2}", "{,2}", "*?", "+?"])
    return f"({expression(depth - 1)}){repeat}"


def test_patterns_match_what_peft_matches():
    random.seed(0)
    agreed = 0
    for _ in range(3000):
        pattern = expression()
        try:
            theirs = re.compile(rf"(.*\.)?({pattern})$")
        except re.error:
            continue
        ours = Patterns({pattern: 1}, "")
        for _ in range(4):
            name = "".join(random.choices("ab._q", k=random.randrange(9)))
            assert (theirs.match(name) is not None) == (ours.value(name, 0) == 1), (pattern, name)
            agreed += theirs.match(name) is not None
    assert agreed > 1000


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_would_take_for_ever_is_matched(pattern):
    begun = time.process_time()
    assert Patterns({pattern: 4}, "").value("a" * 200, 1) == 1
    assert time.process_time() - begun < 20  # backtracking takes years


@pytest.mark.slow
def test_what_still_takes_too_long_is_refused_by_its_field():
    patterns = Patterns(
        {f"(({letter}|.)*.)*x": 1 for letter in "abcdefgh"}, "f.json: alpha_pattern"
    )
    with pytest.raises(ValueError, match=r"f\.json: alpha_pattern must hold patterns that match"):
        for i in range(10_000):
            patterns.value(f"{'a' * 900}{i}", 1)


@pytest.mark.parametrize("pattern", ["(?i)x", "(", "a*+b", "a" * 1001,
                                     r"(a*)*\1", "x{99999999999999999999}", "(?<=a*)b",
                                     ])  # fmt: skip
def test_a_pattern_that_peft_or_we_cannot_match_is_an_error(pattern, tmp_path):
    adapter = {"lora_alpha": 4, "alpha_pattern": {pattern: 2}}
    with pytest.raises(ValueError, match=r"adapter_config\.json: alpha_pattern must hold"):
        audit(folder(tmp_path, adapter=adapter))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("^layers.0.q", 8), ("layers.0.q", 8), ("^base_model.model.layers.0.q", 2), ("q", 8),
     ("^q", 2), (r"layers\.(\d+)\.q", 8)],
)  # fmt: skip
def test_patterns_see_names_as_the_base_model_has_them(pattern, expected, tmp_path):
    adapter = {"lora_alpha": 4, "alpha_pattern": {pattern: 16}}
    assert scale(audit(folder(tmp_path, adapter=adapter))) == expected


def test_an_anchored_pattern_gives_the_scale_that_peft_gives(tmp_path):
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4)))
    config = peft.LoraConfig(
        r=2, target_modules=["0"], init_lora_weights=False, alpha_pattern={"^0": 6}
    )
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path)
    ours = {record.name.removeprefix("base_model.model."): record.scale for record in
            audit(tmp_path).records}  # fmt: skip
    theirs = {record.name.removeprefix("base_model.model."): record.scale for record in
              SpectralTracker(model).measure().records}  # fmt: skip
    assert ours == theirs and sorted(ours.values()) == [3, 4]


# --- Types, sizes, places -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"layer_types": 5}, "layer_types must be of type list, got 5"),
        ("config.json", {"text_config": {"layer_types": 5}}, "text_config.layer_types must be"),
        ("config.json", {"no_rope_layers": {}}, "no_rope_layers must be of type list"),
        ("config.json", {"model_type": ["x"]}, "model_type must be of type str"),
        ("config.json", "[" * 100_000 + "]" * 100_000, "nested more than"),
        ("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than"),
        ("config.json", '{"a":' * 100 + "1" + "}" * 100, "nested more than"),
        ("config.json", "[1]", "must hold a JSON object, got"),
        ("config.json", '{"a": ' + "9" * 5000 + "}", "digits"),
        ("adapter_config.json", {"lora_alpha": 10**400}, "lora_alpha must be a number, got 1000"),
        ("adapter_config.json", '{"lora_alpha": Infinity}', "lora_alpha must be a number, got inf"),
        ("adapter_config.json", {"lora_alpha": 1, "r": "x"}, "r must be a number, got 'x'"),
        (
            "adapter_config.json",
            {"lora_alpha": 1, "alpha_pattern": {"a": 10**400}},
            "must map patterns to numbers",
        ),
        ("adapter_config.json", {"lora_alpha": 1, "rank_pattern": [1]}, "rank_pattern must be"),
        ("adapter_config.json", {"lora_alpha": 1, "target_parameters": [3]}, "a list of names"),
        ("adapter_config.json", {"peft_type": ["LORA"]}, "peft_type must be of type str"),
    ],
    ids=range(16),
)
@pytest.mark.parametrize("read", [audit, lambda path: plan_truncation(path, rank=1)],
                         ids=["audit", "truncate"])  # fmt: skip
def test_a_field_of_another_type_or_size_is_named(read, name, content, said, tmp_path):
    kind = "config" if name == "config.json" else "adapter"
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.* {said}") as caught:
        read(folder(tmp_path, **{kind: content}))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("alpha", "said"),
    [(torch.ones(0), "must hold one number, got 0"), (torch.ones(3), "must hold one number, got 3"),
     (torch.tensor(torch.inf), "must be a finite number, got inf")],
)  # fmt: skip
def test_an_alpha_of_kohya_is_one_finite_number(alpha, said, tmp_path):
    weights = {"m.lora_down.weight": torch.eye(2, 4), "m.lora_up.weight": torch.eye(4, 2)}
    with pytest.raises(ValueError, match=rf"model\.safetensors: m\.alpha {said}"):
        audit(folder(tmp_path, **weights, **{"m.alpha": alpha}))


@pytest.mark.parametrize("name", ["²", "9" * 5000, "a" * 2000, "x.٣.y", "1" * 30])
def test_names_of_any_characters_are_read_or_refused(name, tmp_path):
    weights = {f"{name}.q_proj.weight": torch.eye(4), f"{name}.k_proj.weight": torch.eye(4)}
    if len(name) < 1000:
        assert len(audit(folder(tmp_path, **weights)).records) == 1
    else:
        with pytest.raises(ValueError, match="must name weights in at most 1000 characters"):
            audit(folder(tmp_path, **weights))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/../../b", "..", "", 3,
                                   None, ["x"], "C:\\x", "a\\..\\b", "x\0y",
                                   "a" * 5000])  # fmt: skip
def test_an_index_names_files_inside_its_folder(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"q_proj.weight": shard}})
    )
    with pytest.raises(ValueError, match=r"index\.json: weight_map must name files"):
        audit(tmp_path)


def test_shards_in_folders_and_behind_symbolic_links_are_read(tmp_path):
    folder(tmp_path / "blobs")
    here = tmp_path / "snapshot"
    (here / "part").mkdir(parents=True)
    (here / "part" / "x.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    names = list(safetensors.load_file(tmp_path / "blobs" / "model.safetensors"))
    (tmp_path / "index").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "part/x.safetensors")})
    )
    (here / "model.safetensors.index.json").symlink_to(tmp_path / "index")
    assert len(audit(here).records) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_not_waited_for(name, tmp_path):
    folder(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*got a pipe or a device"):
        audit(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name}.*got a folder"):
        audit(tmp_path)


@pytest.mark.parametrize("shape", [(), (0,), (4,), (0, 4)])
@pytest.mark.parametrize("ends", [("in_proj_weight",), ("q_proj_weight", "k_proj_weight"),
                                  ("q_proj.weight", "k_proj.weight"), ("qkv.weight",),
                                  ("lora_A.weight", "lora_B.weight"), ("query_key_value.weight",),
                                  ])  # fmt: skip
def test_weights_that_are_no_matrix_are_no_pair(ends, shape, tmp_path):
    config = {"num_attention_heads": 2, "head_dim": 2}
    fit = {"a.q_proj.weight": torch.eye(4), "a.k_proj.weight": torch.eye(4)}
    weights = {**fit, **{f"x.{end}": torch.ones(shape) for end in ends}}
    found = audit(folder(tmp_path, config=config, **weights), values=True)
    assert [record.name for record in found.records] == ["a"]
    weights["x.q_proj.weight"] = torch.ones(4, 4)  # and its K has no rows
    weights["x.k_proj.weight"] = torch.ones(0, 4)
    assert len(audit(folder(tmp_path, config=config, **weights)).records) >= 1


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 1), (6, 3, 1, 1)])
def test_a_fused_weight_of_more_dimensions_is_a_matrix(shape, tmp_path):
    weight = torch.arange(18.0).view(6, 3)
    weights = {"a.self_attn.in_proj_weight": weight.view(shape)}
    config = {"num_attention_heads": 1, "hidden_size": 2}
    (record,) = audit(folder(tmp_path, config=config, **weights), level="head").records
    values = torch.linalg.svdvals(weight[:2].double().T @ weight[2:4].double())
    assert record.nuclear == pytest.approx(values.sum().item())


@pytest.mark.parametrize("value", [10**400, "x", None, [], 1j])
def test_a_decay_that_is_no_number_is_an_error_of_its_group(value, tmp_path):
    saved = {"param_groups": [{"weight_decay": value, "params": [0]}], "state": {}}
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt: .*weight_decay|cannot be read"):
        lint_file(tmp_path)


def test_a_scalar_among_factors_does_not_stop_a_truncation(tmp_path):
    weights = {"m.lora_A.weight": torch.eye(2, 4), "m.lora_B.weight": torch.eye(4, 2),
               "n.lora_A.weight": torch.tensor(1.0)}  # fmt: skip
    folder(tmp_path, adapter={"lora_alpha": 2, "r": 2}, **weights)
    assert len(plan_truncation(tmp_path, rank=1).report.records) == 1


@pytest.mark.parametrize("packed", ["x", "[1]", '{"a.r": 2, "a.rank_pattern": 5}'])
def test_a_header_of_diffusers_is_checked(packed, tmp_path):
    weights = {"a.m.lora_A.weight": torch.eye(2, 4), "a.m.lora_B.weight": torch.eye(4, 2)}
    safetensors.save_file(weights, tmp_path / "x.safetensors", {"lora_adapter_metadata": packed})
    with pytest.raises(ValueError, match="lora_adapter_metadata"):
        plan_truncation(tmp_path / "x.safetensors", rank=1)


def test_factors_whose_product_is_beyond_float64_are_listed(tmp_path):
    large = torch.full((2, 4), 1e200, dtype=torch.float64)
    weights = {"m.lora_A.weight": large, "m.lora_B.weight": large.mT.contiguous(),
               "n.lora_A.weight": torch.eye(2, 4), "n.lora_B.weight": torch.eye(4, 2)}  # fmt: skip
    folder(tmp_path, adapter={"lora_alpha": 2, "r": 2}, **weights)
    assert [record.status for record in audit(tmp_path).records] == ["not finite", "ok"]
    plan = plan_truncation(tmp_path, rank=1)
    assert [record.name for record in plan.report.records] == ["n"]
    assert plan.report.skipped[0][1].startswith("its entries are beyond float64")


# --- Memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys, resource, pathlib
import torch
from mirrorflow.spectrum import audit
folder = pathlib.Path(sys.argv[1])
audit(folder / "first.safetensors")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sorted(folder.glob("shape*.safetensors")):
    assert len(audit(file, level=sys.argv[2]).records) >= 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def update(n, r, m):
    return {"m.lora_A.weight": torch.randn(r, m), "m.lora_B.weight": torch.randn(n, r)}


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
def test_memory_stays_below_the_stated_multiple_of_a_pair_of_any_shape(tmp_path):
    shapes = [(1, 40_000, 1), (40_000, 1, 40_000), (2, 200_000, 3), (1000, 1, 200_000),
              (20, 20_000, 20), (700, 600, 700), (600, 1300, 600), (30, 1500, 1700)]  # fmt: skip
    safetensors.save_file(update(3, 2, 3), tmp_path / "first.safetensors")
    for i, shape in enumerate(shapes):
        safetensors.save_file(update(*shape), tmp_path / f"shape{i}.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "layer"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most = 0
    for (n, r, m), kilobytes in zip(shapes, map(int, done.stdout.split()), strict=True):
        most = max(most, 128 * r * (n + m))
        assert 1024 * kilobytes < most + 32e6, (n, r, m)


@pytest.mark.parametrize(("heads", "key_heads"), [(None, None), (4, 4), (4, 2)])
@pytest.mark.parametrize("level", ["layer", "head"])
def test_a_wide_inner_dimension_has_the_numbers_of_the_dense_product(heads, key_heads, level,
                                                                     tmp_path):  # fmt: skip
    Q, K = (
        torch.randn(80, 4).double(),
        torch.randn(80 * (key_heads or 1) // (heads or 1), 5).double(),
    )
    weights = {"x.self_attn.q_proj.weight": Q, "x.self_attn.k_proj.weight": K}
    config = {"num_attention_heads": heads, "head_dim": 20} if heads else {}
    if heads is None and level == "head":
        return
    found = audit(folder(tmp_path, config=config, **weights), level=level).records
    share = (heads or 1) // (key_heads or 1)
    keys = K.unflatten(0, (key_heads or 1, -1)).repeat_interleave(share, 0)
    queries = Q.unflatten(0, (heads or 1, -1))
    if level == "layer":
        queries, keys = queries.reshape(1, 80, 4), keys.reshape(1, 80, 5)
    assert len(found) == len(queries)
    for record, q, k in zip(found, queries, keys, strict=True):
        values = torch.linalg.svdvals(q.T @ k)
        assert record.nuclear == pytest.approx(values.sum().item())
        assert record.ratio == pytest.approx((values.sum() / values.norm()).item())
        assert record.imbalance == pytest.approx((q @ q.T - k @ k.T).norm().item())
        size = (q.square().sum() + k.square().sum()) / 2
        assert record.gap == pytest.approx((size - values.sum()).item())
        assert record.shape == (4, len(q), 5)


def test_wide_factors_may_be_zero_or_not_finite(tmp_path):
    weights = {}
    for name, fill in (("zero", 0.0), ("nan", torch.nan), ("inf", torch.inf)):
        weights[f"{name}.lora_A.weight"] = torch.full((50, 2), fill)
        weights[f"{name}.lora_B.weight"] = torch.ones(3, 50)
    states = {record.name: record.status for record in audit(folder(tmp_path, **weights)).records}
    assert states == {"zero": "undefined", "nan": "not finite", "inf": "not finite"}


def test_what_takes_too_large_matrices_is_listed_and_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mirrorflow.spectrum.audit"], "CORE", 3)
    found = audit(folder(tmp_path))
    assert len(found.records) == 1
    assert found.skipped == (
        ("layers.0.self_attn", "it takes 4 x 4 numbers, and at most 3^2 are taken"),
    )
    pairs = {"own": ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight")}
    with pytest.raises(ValueError, match="pair 'own': it takes 4 x 4 numbers"):
        audit(tmp_path, pairs=pairs)
