"""`audit` of what torch has written: files of ``torch.save``, folders of ranks, one shard."""

import collections
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from mirrorflow.spectrum import audit, compare, plan_truncation, table
from mirrorflow.spectrum._plain_pickle import Made, Name, plain_pickle

safetensors = pytest.importorskip("safetensors.torch")

ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def weights(seed=0, layers=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.self_attn.{name}_proj.weight": torch.randn(6, 4, generator=generator)
        for i in range(layers) for name in "qk"
    }  # fmt: skip


def numbers(found):
    return [(r.name, r.shape, r.nuclear, r.ratio, r.rank_99) for r in found.records]


def expected(folder, state):
    safetensors.save_file(state, folder / "expected.safetensors")
    found = numbers(audit(folder / "expected.safetensors"))
    (folder / "expected.safetensors").unlink()
    return found


# --- One shard ------------------------------------------------------------------------------------


def shards(folder):
    """Two shards of three, the third not downloaded, and no index."""
    state = weights(layers=3)
    names = sorted(state)
    for i, part in enumerate((names[:3], names[3:])):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        safetensors.save_file({key: state[key] for key in part}, folder / name)


def test_one_shard_says_that_it_is_one_and_what_the_means_are_over(tmp_path):
    shards(tmp_path)
    found = audit(tmp_path / "model-00002-of-00003.safetensors")
    (note,) = found.notes
    assert note.startswith("model-00002-of-00003.safetensors is 1 of 3 shards")
    assert "the means are over what is here" in note
    assert note in table(found) and note in found._repr_html_()
    assert json.loads(found.to_json())["notes"] == [note]
    assert len(found.records) == 1  # the Q of its other layer is in the first shard


def test_a_folder_that_lacks_shards_says_how_many(tmp_path):
    shards(tmp_path)
    assert audit(tmp_path).notes[0].startswith("model is 2 of 3 shards")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    state = {"norm.weight": torch.ones(3)}
    safetensors.save_file(state, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match="is 1 of 3 shards"):
        audit(tmp_path)  # which is why it has no pairs


def test_a_whole_set_has_no_such_note(tmp_path):
    shards(tmp_path)
    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    assert audit(tmp_path).notes == ()


# --- Ranks are whole numbers ----------------------------------------------------------------------


def test_ranks_are_whole_numbers_everywhere_and_the_page_says_that_it_is_a_shard(tmp_path):
    from mirrorflow.lab.report.checkpoint import audit_page

    state = weights()
    state["layers.1.self_attn.q_proj.weight"] *= torch.nan
    safetensors.save_file(state, tmp_path / "x-1-of-2.safetensors")
    found = audit(tmp_path)
    whole, broken = found.records
    assert {type(getattr(whole, f"rank_{p}")) for p in (90, 95, 99)} == {int}
    assert broken.rank_99 != broken.rank_99  # NaN: it is not known
    assert found.to_dict()["records"][0]["rank_99"] == whole.rank_99
    assert f'"rank_99": {whole.rank_99},' in found.to_json()
    both = compare(found, found)
    assert isinstance(both.to_dict()["products"][0]["rank_99_change"], int)
    page = audit_page(found.to_dict(), "x", tmp_path / "page.html", "0").read_text()
    assert '"field":"rank_99","format":"d"' in page and '".4g"' not in page
    assert "x-1-of-2.safetensors is 1 of 2 shards" in page


# --- torch.save -----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", ["", "state_dict", "model", "module"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "run.pt", "last.ckpt"])
def test_files_of_torch_are_read_like_safetensors(name, inside, zipped, tmp_path):
    state = weights()
    content = {inside: state, "step": 3, "optimizer": {"state": {}}} if inside else state
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    right = expected(tmp_path, state)
    assert numbers(audit(tmp_path / name)) == numbers(audit(tmp_path)) == right


def test_an_adapter_and_shards_in_bin_files(tmp_path):
    adapter = {"m.lora_A.weight": torch.randn(2, 6), "m.lora_B.weight": torch.randn(5, 2)}
    torch.save(adapter, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    torch.save({"lr": 1.0}, tmp_path / "optimizer.pt")
    assert audit(tmp_path).records[0].scale == 4
    with pytest.raises(ValueError, match=r"adapter_model\.bin must be a safetensors file"):
        plan_truncation(tmp_path, rank=1)
    state, folder = weights(), tmp_path / "shards"
    folder.mkdir()
    places = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(state)}
    for shard in set(places.values()):
        torch.save({k: v for k, v in state.items() if places[k] == shard}, folder / shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert numbers(audit(folder)) == expected(tmp_path, state) and audit(folder).notes == ()


class Runs:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_file_of_torch_is_run(protocol, tmp_path):
    made = tmp_path / "made"
    torch.save({**weights(), "x": Runs(made)}, tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"x\.pt cannot be read with weights_only=True.*\.mkdir"):
        audit(tmp_path)
    assert not made.exists()
    torch.save(nn.Linear(3, 3), tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"Linear.*save model\.state_dict\(\) alone"):
        audit(tmp_path)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(1).expand(5000, 5000), "entries that share their memory"),
        (torch.eye(6).to_sparse(), "a sparse_coo Tensor"),
        (torch.empty(6, 6, device="meta"), "without data"),
        (torch.ones(6, 6, dtype=torch.int8), "int8"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_are_not_plain_are_listed(weight, reason, tmp_path):
    state = weights(layers=1) | {"x.q_proj.weight": weight, "x.k_proj.weight": weight}
    torch.save(state, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    found = audit(tmp_path)
    assert len(found.records) == 1
    assert found.skipped == (("x", f"stored as {found.skipped[0][1][10:]}"),)
    assert reason in found.skipped[0][1]


def test_several_files_that_may_hold_weights_are_not_guessed_between(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(weights(), tmp_path / name)
    with pytest.raises(ValueError, match=r"must hold one set of weights, got a\.pt, b\.pt"):
        audit(tmp_path)


# --- torch.distributed.checkpoint -----------------------------------------------------------------


@ALONE
def test_a_folder_of_torch_distributed_is_read(tmp_path):
    state = weights()
    state["layers.1.self_attn.k_proj.weight"] = state["layers.1.self_attn.k_proj.weight"].bfloat16()
    content = {"model": state, "step": 3, "optimizer": {"lr": 0.1, "m": [torch.ones(2)]}}
    dcp.save(content, checkpoint_id=tmp_path / "step-3")
    right = expected(tmp_path, {f"model.{k}": v for k, v in state.items()})
    assert numbers(audit(tmp_path / "step-3")) == right
    assert numbers(audit(tmp_path / "step-3" / "__0_0.distcp")) == right
    with pytest.raises(ValueError, match="there are some in step-3: name one"):
        audit(tmp_path)


SHARDED = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = torch.load(f"{folder}/state.pt", weights_only=True)
parts = {}
for i, (key, value) in enumerate(state.items()):
    dim = i % 2
    parts[key] = DTensor.from_local(value.chunk(2, dim)[rank].contiguous(), mesh, [Shard(dim)],
                                    shape=value.shape, stride=value.stride())
dcp.save(parts, checkpoint_id=f"{folder}/sharded")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_weights_that_two_ranks_have_written_are_put_together(tmp_path):
    state = weights(layers=1)
    state |= {"x.in_proj_weight": torch.randn(9, 4)}  # 5 rows and 4
    torch.save(state, tmp_path / "state.pt")
    command = [sys.executable, "-c", SHARDED]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in (0, 1)]
    assert [process.wait(120) for process in ranks] == [0, 0]
    assert len(list((tmp_path / "sharded").glob("*.distcp"))) == 2
    assert numbers(audit(tmp_path / "sharded")) == expected(tmp_path, state)
    (tmp_path / "sharded" / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__1_0\.distcp is missing"):
        audit(tmp_path / "sharded")


@ALONE
def test_parts_of_a_weight_are_put_where_they_belong(tmp_path):
    state = weights(layers=1)
    (query, key), names = state.values(), list(state)
    parts = {"a": query[:4], "b": query[4:], "c": key[:, :1], "d": key[:, 1:]}
    dcp.save({k: v.clone() for k, v in parts.items()}, checkpoint_id=tmp_path)

    def join(metadata):
        old, stored = metadata.state_dict_metadata, metadata.storage_data
        where = {"a": (0, 0), "b": (4, 0)}, {"c": (0, 0), "d": (0, 1)}
        for name, places in zip(names, where, strict=True):
            chunks = []
            for part, offsets in places.items():
                found = old.pop(part)
                chunks.append(type(found.chunks[0])(torch.Size(offsets), found.size))
                (index,) = [key for key in stored if key.fqn == part]
                stored[type(index)(name, torch.Size(offsets))] = stored.pop(index)
            old[name] = type(found)(found.properties, state[name].shape, chunks)

    rewritten(tmp_path, join)
    assert numbers(audit(tmp_path)) == expected(tmp_path, state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_read_as_plain_data_and_imports_nothing(protocol, tmp_path):
    plain = {
        "a": [1, -(2**70), 2.5, None, True, (), (1,), (1, 2, 3, 4)],
        "b": {"c": "é", "d": b"x"},
    }
    found = plain_pickle(pickle.dumps(plain, protocol))
    assert found["a"] == plain["a"] and found["b"]["c"] == "é"
    ran = plain_pickle(pickle.dumps(Runs(tmp_path / "made"), protocol))
    assert isinstance(ran, Made) and ran.by.name == "mkdir"
    assert not (tmp_path / "made").exists()
    unknown = b"\x80\x02c" + b"no_such_module\nno_such_name\n."
    assert plain_pickle(unknown) == Name("no_such_module", "no_such_name")


def rewritten(folder, change):
    """Write the metadata again, with a change in its content."""
    with (folder / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def elsewhere(metadata):
    for entry in metadata.storage_data.values():
        entry.relative_path = "../x.distcp"


def larger(metadata):
    for entry in metadata.state_dict_metadata.values():
        entry.size = torch.Size((1 << 20, 1 << 20))


def all_larger(metadata):
    larger(metadata)
    for entry in metadata.state_dict_metadata.values():
        entry.chunks[0] = type(entry.chunks[0])(torch.Size((0, 0)), torch.Size(entry.size))


def packed(metadata):
    for entry in metadata.storage_data.values():
        entry.transform_descriptors = ["zstd"]


@ALONE
@pytest.mark.parametrize(
    ("change", "said"),
    [(elsewhere, "must name files inside"), (larger, "parts of .* are missing"),
     (all_larger, "a part of .* is smaller than its shape"), (packed, "compressed weights"),
     (lambda m: m.storage_data.clear(), "is damaged")],
)  # fmt: skip
def test_metadata_that_a_stranger_has_changed_is_refused(change, said, tmp_path):
    dcp.save(weights(), checkpoint_id=tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        audit(tmp_path)


@ALONE
def test_neither_the_metadata_nor_the_parts_of_a_stranger_run_anything(tmp_path):
    state = weights()
    dcp.save(state, checkpoint_id=tmp_path)
    made, part = tmp_path / "made", tmp_path / "__0_0.distcp"
    original = (tmp_path / ".metadata").read_bytes()
    rewritten(tmp_path, lambda m: setattr(m, "planner_data", Runs(made)))
    assert len(audit(tmp_path).records) == 2 and not made.exists()  # read, and not looked at
    rewritten(tmp_path, lambda m: m.state_dict_metadata.update(x=Runs(made)))
    made.rmdir()  # of the rewriting
    assert len(audit(tmp_path).records) == 2 and not made.exists()
    (tmp_path / ".metadata").write_bytes(original)
    stream = io.BytesIO()
    torch.save(Runs(made), stream)
    content = stream.getvalue()
    rewritten(
        tmp_path,
        lambda m: [
            (setattr(entry, "offset", 0), setattr(entry, "length", len(content)))
            for entry in m.storage_data.values()
        ],
    )
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged, or holds no tensor there"):
        audit(tmp_path)
    assert not made.exists()


@ALONE
def test_compressed_entries_are_not_unpacked(tmp_path):
    state = {"x.q_proj.weight": torch.zeros(64, 64), "x.k_proj.weight": torch.zeros(64, 64)}
    dcp.save(state, checkpoint_id=tmp_path)
    part = tmp_path / "__0_0.distcp"
    stream, small = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(64, 64), stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    part.write_bytes(small.getvalue() + bytes(64 * 64 * 4))
    rewritten(
        tmp_path,
        lambda m: [
            (setattr(entry, "offset", 0), setattr(entry, "length", part.stat().st_size))
            for entry in m.storage_data.values()
        ],
    )
    with pytest.raises(ValueError, match=r"compressed|holds no tensor there"):
        audit(tmp_path)


@ALONE
def test_damaged_metadata_are_an_error_that_names_the_file_and_a_way_out(tmp_path):
    dcp.save(weights(), checkpoint_id=tmp_path)
    whole = (tmp_path / ".metadata").read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], b"\x80\x04K\x01.", b"\x80\x04)\x81.", b"x" * 50,
                    pickle.dumps(collections.OrderedDict(a=1))):  # fmt: skip
        (tmp_path / ".metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.metadata is damaged.* dcp_to_torch FOLDER"):
            audit(tmp_path)
