"""Values from strangers' files run nothing in the pages: they are escaped, and the policy holds."""

import itertools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import altair as alt
import pytest
import torch

import browser
from mirrorflow.cli.page import _section
from mirrorflow.lab import framework, report
from mirrorflow.lab.report import checkpoint, page
from mirrorflow.spectrum import audit

safetensors = pytest.importorskip("safetensors.torch")

RAN = "document.documentElement.dataset.ran{}=1"
KINDS = (  # each closes what it may stand in: an attribute, an element, a script, JSON, a comment
    "'\"><script>{}</script>",
    "</script></title></style><script>{}</script>",
    "<img src=x onerror={}>",
    "'\"-->]]><svg onload={}></svg>",
    '" autofocus tabindex=0 onfocus={} x="',
    "${{{}}}`;{};//",
    "'+({})+'",
)
OPEN, CLOSE = "'\"><script>/*", "*/{}//</script>"
numbers = itertools.count()


def script():
    return RAN.format(next(numbers))


def payload():
    return random.choice(KINDS).replace("{{", "{").replace("}}", "}").replace("{}", script())


def places(value, path=()):
    """Walk a value of JSON: the paths of its leaves, and those of its keys (marked by None)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, None, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))
    else:
        yield path


def put(value, path, text):
    """Return a copy of JSON with a text at a place."""
    new = json.loads(json.dumps(value))
    *way, last = path
    renamed = bool(way) and way[-1] is None
    inner = new
    for step in way[:-1] if renamed else way:
        inner = inner[step]
    if renamed:
        inner[text] = inner.pop(last)
    else:
        inner[last] = text
    return new


RESULT = {
    "format": 1, "experiment": "fig00", "hash": "0123456789ab", "status": "completed",
    "seconds": 1.5, "started": "2026-01-01", "config": {"model": "small", "list": ["a"], "n": 3},
    "records": [{"label": "one", "x": 1.0, "y": 2.0}], "meta": {"versions": {"torch": "2"},
    "commit": "abc"},
}  # fmt: skip


class Open:
    """An experiment that shows whatever its records hold, wherever a page has room for it."""

    NAME, TITLE, PAPER = "fig00", "A title", "Figure 0"

    class Config(SimpleNamespace):
        def model_dump(self):
            return vars(self)

    @staticmethod
    def said(records):
        return " ".join(f"{key} {value}" for record in records for key, value in record.items())

    def verdicts(self, records):
        return [(f"{key} {value}", self.said(records)) for r in records for key, value in r.items()]

    def table(self, records):
        return records

    def charts(self, records, curves):
        text = self.said(records)
        values = [{**records[0], "said": text, "url": f"javascript:{text}"}]
        chart = alt.Chart(alt.Data(values=values), title=text).mark_text(text=text)
        names = [alt.Tooltip(field=key, type="nominal", title=text) for key in records[0]]
        return [(text, chart.encode(
            x=alt.X(field=next(iter(records[0])), type="nominal", title=text),
            color=alt.Color("said:N", title=text), href="url:N", tooltip=names, text="said:N",
        ))]  # fmt: skip

    def __getattr__(self, name):
        raise AttributeError(name)


def sections(monkeypatch):
    """Make the sections of results with scripts in every place, in turn and in pairs."""
    monkeypatch.setattr(framework, "load", lambda name: Open())
    monkeypatch.setattr(framework, "trajectory", lambda folder: {})
    monkeypatch.setattr(framework, "config_from", lambda *_: Open.Config(**RESULT["config"]))
    fields = list(places(RESULT))
    single = [put(RESULT, field, payload()) for field in fields]
    values, pairs = [field for field in fields if None not in field], []
    for _ in range(12):  # each opens and closes in turn: every two of them are a pair
        result = RESULT
        for i, field in enumerate(random.sample(values, len(values))):
            if field[0] in ("experiment", "hash", "seconds"):
                continue  # these have a form, and are refused alone
            result = put(result, field, CLOSE.replace("{}", script()) if i % 2 else OPEN)
        pairs.append(result)
    made, refused = [], []
    for result in (*single, *pairs):
        result = {**result, "folder": None}
        try:
            made.append(_section(Path(), result, [result, RESULT]))
        except Exception:  # the command names the run, and shows the others
            refused.append(result)
    return made, refused


def executed(html, path):
    path.write_text(html, encoding="utf-8")
    drawn, _ = browser.dom(path, "--virtual-time-budget=2000")
    return re.findall(r"data-ran(\d+)", re.search(r"<html[^>]*>", drawn).group())


def without_policy(html):
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", html)
    assert bare != html
    return bare


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Audit checkpoints with scripts in names, configurations and headers."""
    random.seed(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    config = {
        "model_type": "qwen2",
        "architecture": "vit",
        "num_attention_heads": 2,
        "layer_types": ["x"],
        "text_config": {"model_type": "y"},
    }
    adapter = {
        "peft_type": "LORA",
        "lora_alpha": 4,
        "alpha_pattern": {"a": 2},
        "r": 2,
        "target_modules": ["q"],
        "target_parameters": ["e.w"],
        "use_rslora": False,
    }
    names = ["{}.self_attn.q_proj.weight", "{}.self_attn.k_proj.weight", "{}.lora_A.{}.weight",
             "{}.lora_B.{}.weight", "{}.attn.qkv.weight", "{}.lora_A.weight", "{}.lokr_w1",
             "alone{}.lora_up.weight", "alone{}.lora_down.weight"]  # fmt: skip
    merged, refused = {"records": [], "skipped": []}, 0
    settings = [(config, adapter)]
    settings += [(put(config, p, payload()), adapter) for p in places(config)]
    settings += [(config, put(adapter, p, payload())) for p in places(adapter)]
    for number, (one, other) in enumerate(settings):
        here = folder / str(number)
        here.mkdir()
        text = payload()
        weights = {name.replace("{}", text): torch.rand(6, 6) for name in names}
        safetensors.save_file(weights, here / "model.safetensors", metadata={payload(): payload()})
        (here / "config.json").write_text(json.dumps(one))
        (here / "adapter_config.json").write_text(json.dumps(other))
        try:
            found = audit(here).to_dict()
        except ValueError:
            refused += 1
            continue
        for key in ("records", "skipped"):
            merged[key] += found[key]
        merged["summary"] = found["summary"]
    assert len(merged["records"]) > 20 and len(merged["skipped"]) > 20
    return merged, refused


@pytest.mark.browser
def test_no_field_of_a_result_runs_a_script_in_the_report(monkeypatch, tmp_path):
    random.seed(0)
    made, refused = sections(monkeypatch)
    assert len(made) > len(refused) > 0
    html = report.build(made, tmp_path / "page.html", "1").read_text()
    assert executed(without_policy(html), tmp_path / "escaped.html") == []
    monkeypatch.setattr(page, "escape", str)
    html = report.build(made, tmp_path / "page.html", "1").read_text()
    assert executed(html, tmp_path / "policy.html") == []
    assert executed(without_policy(html), tmp_path / "neither.html")  # the test can see


@pytest.mark.browser
def test_no_name_and_no_field_of_a_checkpoint_runs_a_script_in_the_audit(
    files, monkeypatch, tmp_path
):
    content, source = files[0], payload()
    html = checkpoint.audit_page(content, source, tmp_path / "page.html", "1").read_text()
    assert executed(without_policy(html), tmp_path / "escaped.html") == []
    for module in (page, checkpoint):
        monkeypatch.setattr(module, "escape", str)
    html = checkpoint.audit_page(content, source, tmp_path / "page.html", "1").read_text()
    assert executed(html, tmp_path / "policy.html") == []


def made_of(result):
    return report.Section("", "", [], result, [], [], "")


@pytest.mark.parametrize("key", ["hash", "experiment"])
@pytest.mark.parametrize("value", ['"><script>', "../x", "", "a b", 3, None, "A" * 100, "ab\n"])
def test_names_have_a_form(key, value):
    with pytest.raises(ValueError, match=f"{key} must (match|be str)"):
        made_of({**RESULT, key: value})


@pytest.mark.parametrize("key", ["status", "started", "seconds", "config", "meta", "hash"])
@pytest.mark.parametrize("value", [[], None, True])
def test_what_a_result_lacks_is_named(key, value):
    with pytest.raises(ValueError, match=f"{key} must be .*, got {re.escape(repr(value))}"):
        made_of({**RESULT, key: value})
    with pytest.raises(ValueError, match=f"{key} must be"):
        made_of({name: value for name, value in RESULT.items() if name != key})


def test_the_policy_names_each_script_of_the_page_and_nothing_that_would_open_it(tmp_path):
    html = report.build([], tmp_path / "page.html", "1").read_text()
    rules = re.search(r'Content-Security-Policy" content="(.*?)"', html).group(1)
    rules = dict(rule.strip().split(" ", 1) for rule in rules.replace("&#x27;", "'").split(";"))
    scripts = re.findall(r'<script(?: type="module")?>', html)
    assert rules["script-src"].count("'sha256-") == len(scripts) == 3
    assert rules["default-src"] == "'none'"
    assert not re.search("unsafe|http|\\*", rules["script-src"])
    assert not re.search(
        r"<[a-z][^<>]* on\w+=", re.sub(r"<script.*?</script>", "", html, flags=re.S)
    )
