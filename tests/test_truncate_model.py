"""Truncated in place, a model computes with the truncated products of its heads and adapters."""

import pytest
import torch
from torch import nn

from mirrorflow.spectrum import SpectralTracker
from mirrorflow.spectrum.truncate import truncate

tf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 16}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = torch.tensor([[5, 7, 11, 3, 9, 30], [4, 4, 8, 21, 6, 12]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).sin().view(2, 3, 32, 32)
HEADS, WIDTH = 3, 24
IN = {"input_ids": TOKENS}
BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def made(build, std=0.3):
    """A model in float64 whose parameters, biases too, are random."""
    torch.manual_seed(0)
    model = build().double().eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=std)
    return model


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=8, **WORDS))


def bigcode():
    config = tf.GPTBigCodeConfig(n_embd=24, n_layer=2, n_head=3, n_positions=8, **WORDS)
    return tf.GPTBigCodeForCausalLM(config)


def vit():
    config = tf.ViTConfig(**SIZES, num_attention_heads=3, image_size=32, patch_size=16)
    return tf.ViTModel(config)


def bert():
    return tf.BertModel(tf.BertConfig(**SIZES, num_attention_heads=3, **WORDS))


def opt():
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, ffn_dim=16,
            word_embed_proj_dim=24, max_position_embeddings=16, **WORDS,
        )
    )  # fmt: skip


def t5():
    config = tf.T5Config(
        d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=3, vocab_size=40,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def mpt():
    return tf.MptForCausalLM(
        tf.MptConfig(d_model=24, n_heads=3, n_layers=2, max_seq_len=16, vocab_size=40)
    )


def bloom():
    return tf.BloomForCausalLM(tf.BloomConfig(hidden_size=24, n_head=3, n_layer=2, **WORDS))


def llama(**options):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**GROUPED, **options}, **WORDS))


def first(found):
    return next(value for value in found.values() if torch.is_tensor(value))


def output(model, inputs):
    with torch.no_grad():
        return first(model(**inputs))


def dense(product, k):
    U, values, Vh = torch.linalg.svd(product)
    return (U[:, :k] * values[:k]) @ Vh[:k]


def ranks_of(report, kind):
    return {(r.name, r.head): r.new_rank for r in report.records if r.kind == kind}


# The oracle: attention written out, with dense products


def literal(x, parts, ranks, causal):
    """Attention of tokens x (tokens, width), its products formed and truncated by dense SVDs."""
    W_q, W_k, W_v, W_o, b_q, b_v, b_o = parts
    size = WIDTH // HEADS
    total = b_o.expand(len(x), -1).clone()
    for head in range(HEADS):
        mine = slice(head * size, (head + 1) * size)
        scores_of = dense(W_q[mine].T @ W_k[mine], ranks[0][head])
        values_of = dense(W_o[:, mine] @ W_v[mine], ranks[1][head])
        scores = x @ scores_of @ x.T + (x @ (W_k[mine].T @ b_q[mine]))[None]
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        weights = torch.softmax(scores / size**0.5, -1)
        total += weights @ (x @ values_of.T + W_o[:, mine] @ b_v[mine])
    return total


def of_gpt2(module):
    (W_q, W_k, W_v) = module.c_attn.weight.T.split(WIDTH)
    b_q, _, b_v = module.c_attn.bias.split(WIDTH)
    return W_q, W_k, W_v, module.c_proj.weight.T, b_q, b_v, module.c_proj.bias


def of_vit(module):
    q, k, v, o = module.q_proj, module.k_proj, module.v_proj, module.o_proj
    return q.weight, k.weight, v.weight, o.weight, q.bias, v.bias, o.bias


def literally(model, part, parts_of, report, causal):
    """Replace the attention of a model by the literal one, with the ranks of a report."""
    scores, values = ranks_of(report, "attention"), ranks_of(report, "value-output")
    for name, module in model.named_modules():
        if not name.endswith(part):
            continue
        ranks = [[kind[name, head] for head in range(HEADS)] for kind in (scores, values)]
        module.forward = forward_of(parts_of(module), ranks, causal)
    return model


def forward_of(parts, ranks, causal):
    def forward(x, *_, **__):
        return torch.stack([literal(tokens, parts, ranks, causal) for tokens in x]), None

    return forward


@pytest.mark.parametrize("choice", [{"rank": 5}, {"energy": 0.9}, {"error": 0.4}])
@pytest.mark.parametrize(
    ("build", "inputs", "part", "parts_of", "causal"),
    [
        (gpt2, IN, ".attn", of_gpt2, True),
        (vit, {"pixel_values": PIXELS}, ".attention", of_vit, False),
    ],
)
def test_a_model_computes_with_truncated_products(build, inputs, part, parts_of, causal, choice):
    model = made(build)
    before = output(model, inputs)
    report = truncate(model, **choice)
    assert len(report.records) == 2 * 2 * HEADS and report.skipped == ()
    expected = output(literally(made(build), part, parts_of, report, causal), inputs)
    torch.testing.assert_close(output(model, inputs), expected, rtol=0, atol=1e-10)
    assert (before - expected).abs().max() > 1e-3


def test_records_have_the_errors_of_dense_products_and_of_what_is_stored():
    model = made(gpt2)
    W_q, W_k, W_v, W_o = (w.detach().clone() for w in of_gpt2(model.transformer.h[1].attn)[:4])
    report = truncate(model.float(), error=0.5)
    for record in report.records:
        if record.name != "transformer.h.1.attn":
            continue
        mine = slice(8 * record.head, 8 * record.head + 8)
        is_scores = record.kind == "attention"
        product = W_q[mine].T @ W_k[mine] if is_scores else W_o[:, mine] @ W_v[mine]
        lost = torch.linalg.norm(product - dense(product, record.new_rank))
        assert record.error == pytest.approx((lost / torch.linalg.norm(product)).item(), rel=1e-5)
        assert record.error <= 0.5 and record.stored_error == pytest.approx(record.error, rel=1e-5)
    half = truncate(made(gpt2).bfloat16(), energy=0.9999)
    assert all(r.stored_error > r.error for r in half.records if r.new_rank < r.old_rank)


PROJECTIONS = {
    *("c_attn", "q_attn", "q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v"),
    *("query_key_value", "Wqkv"),
}


def shrunk(model, rank=4):
    """Let Q, K and V see a subspace only, so that their products have a small rank."""
    P = torch.randn(WIDTH, rank, dtype=torch.float64)
    P = P @ torch.linalg.pinv(P)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            weight = module.weight.data
            weight.copy_(P @ weight if type(module).__name__ == "Conv1D" else weight @ P)
    return model


@pytest.mark.parametrize(
    ("build", "inputs", "atol", "products"),
    [
        (bert, IN, 1e-12, 12),
        (opt, IN, 1e-12, 12),
        (t5, BOTH, 1e-12, 18),
        (mpt, IN, 1e-12, 12),
        (bloom, IN, 1e-6, 12),  # its softmax is in float32
        (bigcode, IN, 1e-12, 6),
        (llama, IN, 1e-6, 8),
    ],
)
def test_at_their_numerical_rank_products_lose_nothing(build, inputs, atol, products):
    model = shrunk(made(build))
    before = output(model, inputs)
    report = truncate(model, energy=1)
    assert {record.new_rank for record in report.records} == {4} and products == len(report.records)
    assert all(record.old_rank > 4 and record.error < 1e-12 for record in report.records)
    torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=atol)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 6}])
def test_torchs_attention_with_widths_of_its_own(bias, options):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, bias=bias, batch_first=True, **options).double()
    for weight in layer.parameters():
        nn.init.normal_(weight)
    x = torch.randn(2, 5, 16).double()
    kdim, vdim = options.get("kdim", 16), options.get("vdim", 16)
    y, z = torch.randn(2, 4, kdim).double(), torch.randn(2, 4, vdim).double()
    weights = (layer.in_proj_weight.split(16) if not options else
               (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight))  # fmt: skip
    W_q, W_k, W_v = (w.detach().clone() for w in weights)
    zeros = torch.zeros(16).double()
    b_q, b_v = (layer.in_proj_bias[:16], layer.in_proj_bias[32:]) if bias else (zeros, zeros)
    b_q, b_v, W_o = (
        b_q.detach().clone(),
        b_v.detach().clone(),
        layer.out_proj.weight.detach().clone(),
    )
    report = truncate(layer, rank=3)
    assert report.skipped == () and len(report.records) == 4
    expected = (layer.out_proj.bias if bias else zeros).detach().expand(2, 5, 16).clone()
    for mine in (slice(0, 8), slice(8, 16)):
        scores = x @ dense(W_q[mine].T @ W_k[mine], 3) @ y.mT
        scores = (scores + (y @ W_k[mine].T @ b_q[mine])[:, None]) / 8**0.5
        read = z @ dense(W_o[:, mine] @ W_v[mine], 3).T + W_o[:, mine] @ b_v[mine]
        expected += torch.softmax(scores, -1) @ read
    torch.testing.assert_close(layer(x, y, z)[0], expected, rtol=0, atol=1e-10)


def test_heads_that_share_keys_are_truncated_one_by_one():
    model = made(bigcode)
    attention = model.transformer.h[0].attn
    before, bias = attention.c_attn.weight.detach().clone(), attention.c_attn.bias.detach().clone()
    report = truncate(model, rank=3)
    after, key = attention.c_attn.weight.detach(), before[24:32]
    assert after[24:].equal(before[24:]) and attention.c_attn.bias.equal(bias)
    for head in range(3):
        mine = slice(8 * head, 8 * head + 8)
        expected = dense(before[mine].T @ key, 3)
        torch.testing.assert_close(after[mine].T @ key, expected, rtol=0, atol=1e-10)
    assert all("may raise the rank" in record.notes[-1] for record in report.records)
    assert {reason for _, reason in report.skipped} == {
        "V has a bias that heads share: W_O b_V cannot stay"
    }


def test_values_of_rotary_models_are_truncated_and_their_scores_are_not():
    model = made(llama)
    attention = model.model.layers[0].self_attn
    before = {name: weight.detach().clone() for name, weight in attention.named_parameters()}
    report = truncate(model, rank=2)
    after = dict(attention.named_parameters())
    assert {name for name in before if not after[name].equal(before[name])} == {"o_proj.weight"}
    for head in range(4):
        mine, shared = slice(6 * head, 6 * head + 6), slice(6 * (head // 2), 6 * (head // 2) + 6)
        value = before["v_proj.weight"][shared]
        expected = dense(before["o_proj.weight"][:, mine] @ value, 2)
        found = after["o_proj.weight"][:, mine] @ value
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert len(report.skipped) == 2 and all("rotary" in reason for _, reason in report.skipped)


def steps(model, loss, count=6):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize(("bias", "rank"), [(False, 3), (True, 4)])
def test_training_does_not_raise_the_rank_again(bias, rank):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, bias=bias, batch_first=True).double()
    for weight in layer.parameters():
        nn.init.normal_(weight)
    report = truncate(layer, rank=3)
    noted = {note for record in report.records for note in record.notes}
    assert len(noted) == int(bias)
    x, target = torch.randn(4, 6, 16).double(), torch.randn(4, 6, 16).double()
    before = layer.in_proj_weight.detach().clone()
    steps(layer, lambda m: ((m(x, x, x)[0] - target) ** 2).mean())
    assert not layer.in_proj_weight.equal(before)
    W_q, W_k, W_v = layer.in_proj_weight.split(16)
    for W_a, W_b in ((W_q, W_k), (layer.out_proj.weight.T, W_v)):
        for mine in (slice(0, 8), slice(8, 16)):
            values = torch.linalg.svdvals(W_a[mine].T @ W_b[mine])
            assert values[rank] < 1e-9 * values[0]


# LoRA


def adapted(**options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=6, init_lora_weights=False, target_modules=["q_proj"], **options)
    model = peft.get_peft_model(llama(), config).double().eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def test_updates_are_truncated_in_place_and_nothing_else():
    model, other = adapted(lora_alpha=5), adapted(lora_alpha=5)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    report = truncate(model, rank=2)
    assert len(report.records) == 2 and {r.kind for r in report.records} == {"lora"}
    assert {name: weight.shape for name, weight in model.named_parameters()} == shapes
    for layer, old in zip(layers(model), layers(other), strict=True):
        update = old.get_delta_weight("default")
        old.base_layer.weight.data += dense(update.detach(), 2)
        old.scaling["default"] = 0.0
        assert layer.base_layer.weight.shape == old.base_layer.weight.shape
    torch.testing.assert_close(output(model, IN), output(other, IN), rtol=0, atol=1e-10)
    steps(model, lambda m: m(TOKENS, labels=TOKENS).loss, 3)
    for layer in layers(model):
        values = torch.linalg.svdvals(layer.get_delta_weight("default"))
        assert values[1] > 1e-6 and values[2] < 1e-9 * values[0]


def test_frozen_products_are_truncated_on_request_only():
    model = adapted()
    for weight in model.parameters():
        weight.requires_grad = False
    with pytest.raises(ValueError, match="frozen=True"):
        truncate(model, rank=2)
    report = truncate(model, rank=2, frozen=True)
    assert {record.kind for record in report.records} == {"lora", "value-output"}
    assert all("merge_and_unload" in reason for _, reason in report.skipped)
    only = truncate(adapted(), rank=2, frozen=True, match="lora")
    assert {record.kind for record in only.records} == {"lora"}


def test_merged_updates_dora_and_fresh_adapters_are_told():
    model = adapted()
    model.merge_adapter()
    report = truncate(model, rank=2)
    assert report.records == () and all("unmerge" in reason for _, reason in report.skipped)
    assert all("DoRA" in r.notes[0] for r in truncate(adapted(use_dora=True), rank=2).records)
    fresh = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert {reason for _, reason in truncate(fresh, rank=2).skipped} == {
        "A B = 0, as at LoRA's start"
    }


def test_tied_adapters_are_truncated_once():
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True)
    config = peft.LoraConfig(
        r=6, init_lora_weights=False, target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    report = truncate(model, energy=0.7)
    ((record,), ((_, reason),)) = report.records, report.skipped
    assert "its factors are those of" in reason and record.energy >= 0.7
    (embedding,) = (m for m in layers(model) if isinstance(m, peft.tuners.lora.Embedding))
    kept = torch.linalg.matrix_rank(embedding.get_delta_weight("default").double(), rtol=1e-5)
    assert kept == record.new_rank


# What cannot be done


def qwen3():
    config = {**GROUPED, "head_dim": 6}
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**config, **WORDS))


def qwen2():
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, **WORDS))


def deberta():
    config = tf.DebertaV2Config(
        **SIZES, num_attention_heads=3, relative_attention=True, pos_att_type=["c2p"],
        share_att_key=True, **WORDS,
    )  # fmt: skip
    return tf.DebertaV2Model(config)


@pytest.mark.parametrize(
    ("build", "scores", "values"),
    [
        (qwen3, "Q and K are normalized", ""),
        (qwen2, "rotary", "V has a bias that heads share"),
        (deberta, "relative positions", ""),
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "bias_k may meet", "bias_k may"),
        (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn", "add_zero_attn"),
    ],
)
def test_what_is_no_product_of_two_weights_is_skipped_and_left_alone(build, scores, values):
    model = made(build)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    report = truncate(model, rank=1)
    reasons = {name.endswith("V-O"): reason for name, reason in report.skipped}
    assert reasons[False].find(scores) >= 0 and (reasons.get(True, "").find(values) >= 0)
    assert bool(ranks_of(report, "value-output")) == (values == "")
    assert not ranks_of(report, "attention")
    for name, weight in model.named_parameters():
        touched = not values and ("v_proj" in name or "o_proj" in name or "dense" in name)
        assert touched or weight.equal(before[name]) or "value_proj" in name


class Turned(nn.Module):
    """Attention of somebody's own, with rotary embeddings that are not a module."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(8, 8, bias=False))

    def forward(self, x):
        return apply_rotary(self.q_proj(x), self.k_proj(x))  # noqa: F821


class Heir(Turned):
    """One that inherits the code that turns."""


class Extra(nn.MultiheadAttention):
    """One whose scores use another parameter."""

    def __init__(self):
        super().__init__(8, 2)
        self.temperature = nn.Parameter(torch.ones(2))


def test_attention_of_ones_own_is_read_before_it_is_changed():
    holder = nn.ModuleDict({"turned": Turned(), "heir": Heir(), "extra": Extra()})
    report = truncate(holder, rank=2)
    truncated = {(record.name, record.kind) for record in report.records}
    assert truncated == {("turned", "value-output"), ("heir", "value-output")}
    reasons = dict(report.skipped)
    assert "rotary" in reasons["turned"] and "rotary" in reasons["heir"]
    assert "extra.temperature may" in reasons["extra"]


def test_a_broken_head_and_a_zero_head_are_left_alone():
    layer = nn.MultiheadAttention(24, 3, bias=False)
    layer.in_proj_weight.data[0, 0] = torch.nan
    layer.out_proj.weight.data[:, 8:16] = 0
    report = truncate(layer, rank=2)
    assert dict(report.skipped) == {
        "attention head 0": "it holds NaN or infinite entries",
        "attention V-O head 1": "A B = 0, as at LoRA's start",
    }
    assert ranks_of(report, "attention").keys() == {("attention", 1), ("attention", 2)}
    assert layer.in_proj_weight[1:8].abs().sum() > 0


def test_wrapped_models_and_halves_keep_their_names_and_dtypes():
    model = made(gpt2).bfloat16()
    compiled = nn.Module()
    compiled._orig_mod = model  # as torch.compile names it
    report = truncate(compiled, rank=3, match=r"h\.0\..* V-O$|h\.0\.attn$")
    assert {r.name for r in report.records} == {"transformer.h.0.attn"}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    spectra = SpectralTracker(model, level="head", match=r"h\.0\.attn$").measure()
    assert all(record.effective_rank <= 3.01 for record in spectra.records)


def test_a_model_takes_no_output_and_needs_products():
    with pytest.raises(ValueError, match="Save the model yourself"):
        truncate(nn.MultiheadAttention(8, 2), rank=1, out="x")
    with pytest.raises(ValueError, match="no LoRA or attention pairs"):
        truncate(nn.Linear(3, 3), rank=1)
    with pytest.raises(ValueError, match="exactly one"):
        truncate(nn.MultiheadAttention(8, 2))
