"""Mutated files of every kind that a stranger may hand over: read, or refused as the reader says.

`test_fuzz.py` runs some hundred cases of each kind. ``python tests/fuzz.py`` (`make fuzz`) runs
many and prints the counts; a number as argument is the seed.
"""

import collections
import io
import json
import linecache
import pickle
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint

from mirrorflow import schedule_from_dict
from mirrorflow.lab import framework
from mirrorflow.lab.sweep import Study
from mirrorflow.spectrum import audit, plan_truncation, table
from mirrorflow.weightdecay import lint_file

LIMIT = 30  # seconds of a case
NUMBERS = (0, 1, -1, 2, 3, 7, 10**400, -(10**30), 2**63, 0.5, 1e308, 1e-308, float("inf"),
           float("nan"), True, False, None)  # fmt: skip
TEXTS = ("", "x", "LORA", "llama", "(a+)+x", "(?i)x", "(", "^q_proj", ".*", "../x", "a" * 3000,
         "\0", "\ud800", "²", "9" * 5000, "model.safetensors", "F32", "full_attention")  # fmt: skip
PARTS = ("layers", "0", "10", "self_attn", "attn", "q_proj", "k_proj", "v_proj", "o_proj", "qkv",
         "query_key_value", "c_attn", "in_proj_weight", "weight", "lora_A", "lora_B", "default",
         "lora_down", "lora_up", "lora_mid", "alpha", "lora_magnitude_vector", "dora_scale",
         "_orig_mod", "base_layer", "base_model.model", "x_lora", "down", "up", "hada_w1_a",
         "vision_model", "text_model", "norm", "")  # fmt: skip
KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "model_type",
        "architecture", "text_config", "vision_config", "layer_types", "no_rope_layers",
        "global_head_dim", "per_layer_config", "use_qk_norm", "num_heads", "n_embd", "head_ratio",
        "encoder_attention_heads", "backbone_config")  # fmt: skip
ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "alpha_pattern",
    "rank_pattern",
    "use_rslora",
    "target_parameters",
    "target_modules",
    "init_lora_weights",
    "use_dora",
    "use_bdlora",
)


def plain(depth=3):
    """Draw a value of JSON."""
    kind = random.random()
    if depth and kind < 0.15:
        return [plain(depth - 1) for _ in range(random.randrange(4))]
    if depth and kind < 0.3:
        return {random.choice(KEYS + TEXTS): plain(depth - 1) for _ in range(random.randrange(4))}
    if kind < 0.33:
        return deep(random.choice((50, 70, 900, 5000)))
    return random.choice(NUMBERS) if kind < 0.7 else random.choice(TEXTS)


def deep(levels):
    """Nest lists or dicts."""
    value = 1
    for _ in range(levels):
        value = [value] if random.random() < 0.5 else {"text_config": value}
    return value


def json_text(value):
    """Write JSON, also nested deeper than json can, and sometimes damaged."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = '{"a":' * 20_000 + "1" + "}" * 20_000
    return damaged(text.encode()) if random.random() < 0.03 else text.encode()


def damaged(data):
    """Change, cut, repeat or insert some bytes."""
    data = bytearray(data)
    for _ in range(random.randrange(1, 6)):
        where = random.randrange(len(data) + 1)
        kind = random.randrange(4)
        if kind == 0 and where < len(data):
            data[where] = random.randrange(256)
        elif kind == 1:
            data[where : where + random.choice((1, 4, 100))] = b""
        elif kind == 2:
            data[where:where] = random.randbytes(random.choice((1, 2, 8)))
        else:
            data[where:where] = data[where : where + random.choice((1, 10, 200))]
    return bytes(data)


# --- Checkpoints ----------------------------------------------------------------------------------


def name():
    return ".".join(random.choices(PARTS, k=random.randrange(1, 6)))


def tensors():
    """Draw names and shapes: pairs that fit, pairs that do not, and anything."""
    found = {}
    for _ in range(random.randrange(1, 5)):
        module = ".".join(random.choices(PARTS[:6], k=3))
        n, r, m = random.choices((0, 1, 2, 2, 3, 4, 4, 6, 12), k=3)
        ends = random.choice((("q_proj", "k_proj"), ("lora_A", "lora_B"), ("lora_down", "lora_up")))
        found[f"{module}.{ends[0]}.weight"] = (r, m)
        found[f"{module}.{ends[1]}.weight"] = (n, r) if "lora" in ends[0] else (r, n)
        if random.random() < 0.3:
            found[f"{module}.alpha"] = random.choice(((), (), (1,), (1, 1), (0,), (2,)))
        if random.random() < 0.2:
            found[f"{module}.qkv.weight"] = (3 * n, m)
        found[name()] = tuple(random.choices((0, 1, 2, 3, 8), k=random.randrange(5)))
    return found


def safetensors_bytes():
    """Write a file by hand, so that its header may say anything."""
    header, data = {}, b""
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
    for key, shape in tensors().items():
        kind = random.choice(("F32", "F32", "F16", "BF16", "F64", *sizes))
        count = int(np.prod(shape, dtype=int))
        here = random.choice((random.randbytes(count * sizes[kind]), bytes(count * sizes[kind])))
        begin, end = len(data), len(data) + len(here)
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        data += here
        if random.random() < 0.01:
            field = random.choice(("dtype", "shape", "data_offsets"))
            header[key][field] = random.choice((plain(1), [2**62, 4], [0, 2**40], "F4"))
    if random.random() < 0.2:
        header["__metadata__"] = {"lora_adapter_metadata": random.choice((*TEXTS, '{"a.r": 4}'))}
    text = json_text(header)
    length = len(text) if random.random() < 0.97 else random.choice((2**63, len(text) + 1))
    whole = struct.pack("<Q", length) + text + data
    return damaged(whole) if random.random() < 0.1 else whole


def configuration(keys, likely):
    """Draw a configuration that is mostly right."""
    chosen = {key: likely[key]() for key in random.sample(sorted(likely), k=min(3, len(likely)))}
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        chosen[random.choice(keys)] = plain()
    return chosen if random.random() < 0.97 else plain()


def checkpoint(folder):
    """Write a checkpoint and read it."""
    (folder / "model.safetensors").write_bytes(safetensors_bytes())
    # fmt: off
    heads = {"num_attention_heads": lambda: random.choice((1, 2, 3)), "head_dim": lambda: 2,
             "model_type": lambda: random.choice(("llama", "gpt_neox", "bloom", "t5"))}
    alphas = {"lora_alpha": lambda: random.choice((1, 4, 0.5)), "r": lambda: 2,
              "alpha_pattern": lambda: {random.choice(TEXTS): 2},
              "rank_pattern": lambda: {}}
    # fmt: on
    if random.random() < 0.7:
        (folder / "config.json").write_bytes(json_text(configuration(KEYS, heads)))
    if random.random() < 0.7:
        (folder / "adapter_config.json").write_bytes(json_text(configuration(ADAPTER, alphas)))
    if random.random() < 0.15:
        shards = random.choice(("model.safetensors", plain(1)))
        index = {
            "weight_map": {name(): shards for _ in range(2)} if random.random() < 0.9 else plain()
        }
        (folder / "model.safetensors.index.json").write_bytes(json_text(index))
    if random.random() < 0.3:
        plan_truncation(folder, rank=random.choice((1, 2))).report.table()
    found = audit(folder, level=random.choice(("layer", "head")), values=random.random() < 0.5)
    table(found)
    found.to_json()


# --- Optimizers -----------------------------------------------------------------------------------


class Trap:
    """What runs if a file is unpickled as plain pickle would."""

    def __reduce__(self):
        return exec, ("import os; os.environ['MIRRORFLOW_TRAPPED'] = '1'",)


def optimizer(folder):
    """Save the state of an optimizer, mutated, and lint it."""
    weights = [torch.nn.Parameter(torch.ones(random.choice((1, 3)), 2)) for _ in range(2)]
    kind = random.choice(
        (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop)
    )
    made = kind([{"params": [w]} for w in weights], lr=0.1, weight_decay=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    made.step()
    state = made.state_dict()
    for _ in range(random.randrange(3)):
        group = random.choice(state["param_groups"])
        values = (plain(2), np.float64(0.1), torch.ones(2), torch.tensor(0.1), b"x", Trap(), 1j)
        group[random.choice(("weight_decay", "lr", "params", "betas", "new", 3))] = random.choice(
            values
        )
    around = {"optimizer": state, "list": [state], "plain": state, "ordered": state}
    chosen = random.choice(sorted(around))
    content = (
        around[chosen] if chosen == "plain" else collections.OrderedDict({chosen: around[chosen]})
    )
    if random.random() < 0.1:
        content = plain()
    stream = io.BytesIO()
    try:
        if random.random() < 0.1:
            stream.write(pickle.dumps(content, protocol=random.randrange(6)))
        else:
            torch.save(content, stream, pickle_protocol=random.choice((1, 2, 2, 3, 4, 5)),
                       _use_new_zipfile_serialization=random.random() < 0.5)  # fmt: skip
    except RecursionError:
        stream.write(pickle.dumps({"param_groups": []}))
    data = stream.getvalue()
    (folder / "optimizer.pt").write_bytes(damaged(data) if random.random() < 0.6 else data)
    for finding in lint_file(folder):
        str(finding)


# --- Weights as torch writes them -----------------------------------------------------------------


def torch_weights(folder):
    """Write a file of torch.save, or a folder of torch.distributed.checkpoint, and read it."""
    state = {key: torch.rand(shape) for key, shape in tensors().items()}
    if random.random() < 0.1:
        state[name()] = random.choice((Trap(), plain(2), np.ones(2), torch.ones(1).expand(9, 9)))
    if random.random() < 0.5:
        around = random.choice((state, {"state_dict": state}, [state], {"model": [1]}))
        torch.save(around, folder / "model.pt", pickle_protocol=random.choice((2, 2, 4, 5)),
                   _use_new_zipfile_serialization=random.random() < 0.7)  # fmt: skip
        changed = folder / "model.pt"
    else:
        plain_only = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        torch.distributed.checkpoint.save(plain_only, checkpoint_id=folder)
        changed = folder / random.choice((".metadata", ".metadata", "__0_0.distcp"))
    if random.random() < 0.6:
        changed.write_bytes(damaged(changed.read_bytes()))
    audit(folder).to_json()


# --- Schedules and TOML ---------------------------------------------------------------------------


def schedule_dict(depth=3):
    """Draw a schedule as plain values, with mistakes."""
    number = random.choice((0.1, 1, 10, *NUMBERS))
    inner = schedule_dict(depth - 1) if depth else plain(1)
    found = random.choice([
        {"kind": "Constant", "rate": number}, {"kind": "SwitchOff", "rate": 0.1, "at": number},
        {"kind": "Piecewise", "times": [0, number], "rates": [0.1, number, 3]},
        {"kind": "Linear", "start": number, "end": 0, "duration": 10},
        {"kind": "Cosine", "start": 0.1, "end": 0, "duration": number},
        {"kind": "join", "schedules": [inner, inner], "starts": [0, number]},
        {"kind": "Cyclic", "schedule": inner, "period": number, "cycles": number},
    ])  # fmt: skip
    for _ in range(random.choice((0, 0, 1, 2))):
        found[random.choice((*found, "kind", "x", 3))] = plain(2)
    return found


def schedule(folder):
    """Make a schedule and evaluate it."""
    value = schedule_dict() if random.random() < 0.95 else plain()
    if random.random() < 0.01:
        for _ in range(3000):
            value = {"kind": "Cyclic", "schedule": value, "period": 1, "cycles": 2}
    made = schedule_from_dict(value)
    made.rate(3.0)


def study(folder):
    """Read the study of a sweep from a mutated TOML file, and list its configurations."""
    chosen = {
        "experiment": '"fig02_matrix_sensing"', "preset": '"smoke"', "seeds": "[0, 1]",
        "set": "{ start = 0.2 }", "grid": "{ n = [4, 5], r = [1, 2] }", "runs": "[{ n = 6 }]",
    }  # fmt: skip
    for _ in range(random.choice((0, 0, 1, 2))):
        value = random.choice((plain(2), {random.choice(TEXTS): [plain(1)] * 2}, [0] * 10**4))
        try:
            chosen[random.choice((*chosen, "new"))] = json.dumps(value)
        except RecursionError:
            chosen["grid"] = "[" * 5000
    if random.random() < 0.02:
        chosen["grid"] = "{" + ", ".join(f"k{i} = {[0] * 10}" for i in range(12)) + "}"
    lines = [f"{key} = {value}" for key, value in chosen.items() if random.random() < 0.95]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    (folder / "study.toml").write_bytes(damaged(data) if random.random() < 0.4 else data)
    Study.read(folder / "study.toml").configurations()


def settings(folder):
    """Configure an experiment by a mutated TOML file."""
    module = framework.load(random.choice(("fig02_matrix_sensing", "fig09_fig11_fig14_legendre")))
    known = module.Config.preset("smoke").model_dump()
    lines = []
    for key in random.sample(sorted(known), k=min(4, len(known))):
        value = plain(2) if random.random() < 0.4 else known[key]
        try:
            lines.append(f"{key} = {json.dumps(value)}")
        except RecursionError:
            lines.append(f"{key} = {'[' * 5000}")
    if random.random() < 0.1:
        lines.append("[" * random.choice((1, 5000)) + random.choice(TEXTS))
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    (folder / "settings.toml").write_bytes(damaged(data) if random.random() < 0.5 else data)
    framework.config_from(module, "smoke", folder / "settings.toml")


KINDS = {
    checkpoint: (ValueError, FileNotFoundError), torch_weights: (ValueError, FileNotFoundError),
    optimizer: (ValueError, FileNotFoundError),
    schedule: (ValueError,), settings: (ValueError,), study: (ValueError,),
}  # fmt: skip


def meant(error):
    """Whether an error was raised on purpose, in a line of mirrorflow that raises."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = "".join(
        linecache.getline(last.filename, i) for i in range(last.lineno - 3, last.lineno + 1)
    )
    return "mirrorflow" in last.filename and "raise " in text


def overdue(*_):
    raise AssertionError(f"took more than {LIMIT} s")


def one(case, seed):
    """Run a case; return whether it was read, and not refused. Anything else is raised."""
    random.seed(f"{case.__name__} {seed}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, overdue)
            signal.alarm(LIMIT)
        try:
            case(Path(folder))
        except KINDS[case] as error:
            assert 0 < len(str(error)) < 20_000 and meant(error), repr(error)
            return False
        except BaseException as error:
            error.add_note(f"one({case.__name__}, {seed!r})")
            raise
        finally:
            if hasattr(signal, "SIGALRM"):
                signal.alarm(0)
    return True


def run(case, count, seed=0):
    """Return how many cases were read, and how many refused."""
    read = sum(one(case, f"{seed} {number}") for number in range(count))
    return read, count - read


def survey(case, count, seed):
    """Print how many cases were read, refused, and neither; return how many were neither."""
    begun, read, failed = time.time(), 0, 0
    for number in range(count):
        try:
            read += one(case, f"{seed} {number}")
        except Exception:
            failed += 1
            if failed <= 5:
                traceback.print_exc()
    print(f"{case.__name__}: {count} cases, {read} read, {count - read - failed} refused, "
          f"{failed} failed, {time.time() - begun:.0f} s", flush=True)  # fmt: skip
    return failed


def main(seed):
    """Run the long one, and print its counts and its memory."""
    import resource

    counts = {
        checkpoint: 10_000, torch_weights: 3000, optimizer: 3000, schedule: 20_000,
        settings: 2000, study: 2000,
    }  # fmt: skip
    for case in counts:
        run(case, 20, "first")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failed = sum(survey(case, count, seed) for case, count in counts.items())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"memory beyond the imports: {grown:.0f} MB")
    sys.exit(failed > 0 or grown > 300)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
