"""`SpectralTracker` during training: what is stored in the geometry, wrappers, shards, faults."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.testing import CompileCounter

from mirrorflow.spectrum import SpectralTracker, product_spectrum, table

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Attention(nn.Module):
    """The smallest module whose Q and K are found."""

    def __init__(self, d=12, heads=3):
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        return torch.stack([a @ b.mT for a, b in zip(q.chunk(3, -1), k.chunk(3, -1), strict=True)])


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(depth))

    def forward(self, x):
        return sum(layer(x).tanh().sum() for layer in self.layers)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def test_batches_of_equal_shapes_give_what_single_products_give():
    model = net()
    model.layers.append(Attention(6, 3))
    records = SpectralTracker(model).measure().records
    assert [r.name for r in records] == [f"layers.{i}" for i in range(4)]
    for record, layer in zip(records, model.layers, strict=True):
        single = product_spectrum(layer.q_proj.weight.T, layer.k_proj.weight)
        for name in ("nuclear", "frobenius", "ratio", "effective_rank", "stable_rank", "gap"):
            assert getattr(record, name) == pytest.approx(getattr(single, name).item(), rel=1e-9)
        assert record.imbalance == pytest.approx(single.imbalance.norm().item())


def test_the_imbalance_of_each_head_follows_the_law_for_any_loss():
    # A^T A - B B^T = e^{2a} (A0^T A0 - B0 B0^T) under gradient flow with decay (theory.md)
    model, x = net().double(), torch.randn(5, 12, dtype=torch.float64)
    tracker, step, decay, steps = SpectralTracker(model, level="head"), 1e-4, 0.5, 2000
    start = tracker.measure()
    for _ in range(steps):
        gradients = torch.autograd.grad(model(x), list(model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= step * (gradient + decay * weight)
    a = -decay * step * steps
    for before, after in zip(start.records, tracker.measure().records, strict=True):
        assert after.imbalance / before.imbalance == pytest.approx(math.exp(2 * a), rel=2e-3)
        assert after.gap >= 0 and abs(after.nuclear / before.nuclear - 1) > 0.01


def test_the_imbalance_of_lora_follows_the_law_from_its_start_on():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["0"])  # scale 3: the law has none
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config).double()
    x, y = torch.randn(20, 8, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    tracker, rate, decay, steps = SpectralTracker(model), 5e-4, 0.4, 2000
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    (start,) = tracker.measure().records
    assert start.status == "undefined" and start.scale == 3
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    (end,) = tracker.measure().records
    assert end.status == "ok" and end.frobenius > 0.1 and end.gap < start.gap
    absorbed = -rate * decay * steps
    assert end.imbalance / start.imbalance == pytest.approx(math.exp(2 * absorbed), rel=2e-3)


def test_undefined_and_broken_products_are_counted_and_kept_out_of_the_means():
    model = net()
    with torch.no_grad():
        model.layers[0].q_proj.weight.zero_()
        model.layers[1].k_proj.weight[0, 0] = torch.nan
    measured = SpectralTracker(model).measure()
    assert [r.status for r in measured.records] == ["undefined", "not finite", "ok"]
    zero, broken, fine = measured.records
    assert math.isnan(zero.ratio) and zero.nuclear == 0 and zero.gap > 0 and zero.imbalance > 0
    assert math.isnan(broken.ratio) and math.isnan(broken.nuclear)
    assert measured.mean_ratio == fine.ratio and measured.ratio_of_means == fine.ratio
    assert measured.undefined == measured.not_finite == 1
    assert measured.summary()["undefined"] == 1
    text = table(measured)
    assert "1 undefined (A B = 0), not in the means" in text and "1 not finite" in text
    assert '"ratio": null' in measured.to_json()


def test_means_without_any_defined_product_are_nan_and_their_json_is_valid():
    model = net()
    nn.init.zeros_(model.layers[0].q_proj.weight)
    measured = SpectralTracker(model, match=r"layers\.0").measure()
    assert math.isnan(measured.mean_ratio) and math.isnan(measured.ratio_of_means)
    assert measured.to_dict()["summary"]["mean_ratio"] is None


def test_the_ratio_of_means_is_what_the_paper_plots():
    measured = SpectralTracker(net()).measure()
    nuclear = sum(r.nuclear for r in measured.records)
    frobenius = sum(r.frobenius for r in measured.records)
    assert measured.ratio_of_means == pytest.approx(nuclear / frobenius)
    assert measured.ratio_of_means != pytest.approx(measured.mean_ratio, rel=1e-9)


def test_frozen_pairs_are_left_out_unless_asked_for():
    model = net()
    model.layers[1].requires_grad_(False)
    tracker = SpectralTracker(model)
    assert [p.name for p in tracker.pairs] == ["layers.0", "layers.2"]
    assert [p.name for p in tracker.frozen] == ["layers.1"] and "1 frozen" in repr(tracker)
    assert len(SpectralTracker(model, frozen=True).pairs) == 3
    with pytest.raises(ValueError, match="frozen=True"):
        SpectralTracker(model.requires_grad_(False))


def test_a_compiled_model_is_tracked_while_it_trains():
    model, x = net(), torch.randn(4, 12)
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    trackers = SpectralTracker(compiled), SpectralTracker(plain)
    assert [p.name for p in trackers[0].pairs] == ["layers.0", "layers.1", "layers.2"]
    for _ in range(3):
        found, expected = (tracker.measure() for tracker in trackers)
        assert found.mean_ratio == pytest.approx(expected.mean_ratio, rel=1e-5)
        for module in (compiled, plain):
            module(x).backward()
            with torch.no_grad():
                for weight in module.parameters():
                    weight -= 0.01 * weight.grad
                    weight.grad = None
    assert counter.frame_count == 1  # measuring did not make it compile again


def test_parts_that_are_compiled_keep_their_names():
    model = net()
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    assert [p.name for p in SpectralTracker(model).pairs] == [f"layers.{i}" for i in range(3)]


def test_a_wrapped_model_keeps_its_names():
    wrapped = nn.DataParallel(net())
    assert [p.name for p in SpectralTracker(wrapped).pairs] == [f"layers.{i}" for i in range(3)]


def test_a_match_that_leaves_nothing_says_so():
    with pytest.raises(ValueError, match="match='lora': leaves none of 3 pairs"):
        SpectralTracker(net(), match="lora")


def test_parameters_that_are_replaced_are_followed():
    model = net()
    tracker = SpectralTracker(model)
    before = tracker.measure()
    model.load_state_dict(net(1).state_dict(), assign=True)
    assert tracker.measure().mean_ratio != before.mean_ratio
    assert tracker.measure().mean_ratio == SpectralTracker(model).measure().mean_ratio


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_measured_as_they_are(dtype):
    model = net().to(dtype)
    found = SpectralTracker(model).measure().mean_ratio
    assert found == pytest.approx(SpectralTracker(model.double()).measure().mean_ratio, rel=1e-10)


def test_a_model_without_data_is_listed_and_not_measured():
    with torch.device("meta"):
        model = Net()
    tracker = SpectralTracker(model)
    assert len(tracker.pairs) == 3
    with pytest.raises(ValueError, match=r"layers.0.q_proj.weight is on the meta device"):
        tracker.measure()


def test_a_partitioned_weight_is_an_error_that_says_what_to_do():
    model = net()
    tracker = SpectralTracker(model)
    model.layers[0].q_proj.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="GatheredParameters"):
        tracker.measure()


def test_quantized_weights_are_listed():
    model = net()
    for module in (model.layers[0].q_proj, model.layers[0].k_proj):
        weight = torch.zeros(12, 12, dtype=torch.int8)
        module.weight = nn.Parameter(weight, requires_grad=False)
    tracker = SpectralTracker(model)
    assert ("layers.0", "quantized") in tracker.skipped and len(tracker.pairs) == 2


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="level must be 'layer' or 'head', got 'heads'"):
        SpectralTracker(net(), level="heads")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got AdamW"):
        SpectralTracker(torch.optim.AdamW(net().parameters()))


def test_large_layers_are_not_held_together(monkeypatch):
    from mirrorflow.spectrum import _measurement as measurement

    sizes = []
    original = measurement._measure_alike
    monkeypatch.setattr(
        measurement, "_measure_alike", lambda p, *a: sizes.append(len(p)) or original(p, *a)
    )
    tracker = SpectralTracker(Net(5))
    by_parts = measurement.measure(tracker.pairs, tracker._load, "layer", 2000)
    assert sizes == [2, 2, 1]
    whole = tracker.measure().records
    assert [r.nuclear for r in by_parts] == pytest.approx([r.nuclear for r in whole])


def lora_model():
    peft = pytest.importorskip("peft")
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tf.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, n_positions=16, vocab_size=40,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    options = {"target_modules": ["c_attn"], "init_lora_weights": False, "fan_in_fan_out": True}
    return peft.get_peft_model(tf.GPT2LMHeadModel(config), peft.LoraConfig(r=3, **options))


def numbers(model, **options):
    measured = SpectralTracker(model, **options).measure()
    return [[r.nuclear, r.ratio, r.gap, r.imbalance] for r in measured.records]


def _shard(rank, world, file, queue):
    """Measure the same models sharded, on one of the processes."""
    import warnings

    warnings.simplefilter("ignore")
    from torch.distributed import init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    model, plain = lora_model(), net()
    for layer in model.base_model.model.transformer.h:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    found = [numbers(model), numbers(plain), numbers(plain, level="head")]
    queue.put((rank, found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_sharded_weights_measure_what_one_measures(tmp_path):
    expected = [numbers(lora_model()), numbers(net()), numbers(net(), level="head")]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = mp.start_processes(
        _shard, (2, str(Path(tmp_path) / "store"), queue), nprocs=2, join=False
    )
    found = dict(queue.get() for _ in range(2))
    while not processes.join():
        pass
    for rank in range(2):
        for ours, whole in zip(found[rank], expected, strict=True):
            assert torch.allclose(torch.tensor(ours), torch.tensor(whole), rtol=1e-6, atol=1e-9)


def test_a_module_that_is_wrapped_later_is_still_measured():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    tracker = SpectralTracker(model)
    before = tracker.measure()
    model[0] = nn.Sequential(model[0])
    assert tracker.measure() == before
    again = copy.deepcopy(tracker)
    model[0] = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="in_proj_weight must still be in the model"):
        tracker.measure()
    assert again.measure() == before


def test_weights_that_zero_3_has_divided_are_named_with_what_to_do():
    model = Attention()
    for weight in model.parameters():
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # as deepspeed leaves them
    with pytest.raises(ValueError, match=r"q_proj\.weight: ZeRO-3 has divided .*GatheredParam"):
        SpectralTracker(model)


def test_attention_whose_adapters_are_merged_is_measured_with_them_and_says_so():
    peft, tf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=4))
    config = peft.LoraConfig(r=6, init_lora_weights=False, target_modules=["q_proj"])
    model = peft.get_peft_model(base, config).double()
    tracker = SpectralTracker(model, match="attn", frozen=True)
    apart = {r.name: r for r in tracker.measure().records if r.kind == "attention"}
    model.merge_adapter()
    merged = {r.name: r for r in tracker.measure().records if r.kind == "attention"}
    model.unmerge_adapter()
    again = {r.name: r for r in tracker.measure().records if r.kind == "attention"}
    for name in apart:
        assert "without the adapters' updates" in apart[name].notes[-1]
        assert "are merged into" in merged[name].notes[-1]
        assert merged[name].nuclear != apart[name].nuclear
        assert again[name].notes == apart[name].notes
    assert apart
