import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from modernbert_align.core.cause import Cause, Tried
from modernbert_align.core.rows import WeightDifference
from modernbert_align.core.tolerance import Override
from modernbert_align.report.glossary import GLOSSARY, GROUPS
from modernbert_align.report.html_report import render_html

VOID = {"meta", "link", "br", "hr", "img", "input"}
# What a start tag ends by itself, as HTML says; everything else must be closed.
ENDS = {"td": ("td", "th"), "th": ("td", "th"), "tr": ("td", "th", "tr")}
ENDED_BY = {"tr": ("td", "th"), "tbody": ("td", "th", "tr"), "table": ("td", "th", "tr")}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} `%s` &amp;"


class Page(HTMLParser):
    """The elements of a page with their attributes and text; every element must be closed where HTML asks for it."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.open = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def _end(self, tags):
        while self.open and self.open[-1]["tag"] in tags:
            self.open.pop()

    def handle_starttag(self, tag, attrs):
        self._end(ENDS.get(tag, ()))
        element = {"tag": tag, "text": "", "parents": list(self.open), **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        self._end(ENDED_BY.get(tag, ()))
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in attributes.items())]

    def one(self, tag, **attributes):
        (element,) = self.all(tag, **attributes)
        return element

    def inside(self, element, tag):
        return [e for e in self.elements if e["tag"] == tag and any(p is element for p in e["parents"])]

    def of_class(self, name):
        return [e for e in self.elements if name in (e.get("class") or "").split()]

    @property
    def title(self):
        (head,) = self.all("head")
        (element,) = self.inside(head, "title")
        return element["text"]

    @property
    def banner(self):
        (element,) = self.of_class("banner")
        return element

    def cells(self, anchor):
        return [cell["text"].strip() for cell in self.inside(self.one("tr", id=anchor), "td")]


def show(report):
    return Page(render_html(report))


def test_it_is_one_page_with_a_language_a_title_and_ordered_headings(make_report):
    page = show(make_report())
    assert render_html(make_report()).lstrip().lower().startswith("<!doctype html>")
    assert page.one("html")["lang"] == "en"
    assert page.title.startswith("PASS: tiny masked_lm bf16")
    assert len(page.all("h1")) == 1
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch(r"h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels)), "no level is skipped"
    sections = [e["id"] for e in page.all("section")]
    assert sections == [
        "first",
        "charts",
        "map",
        "steps",
        "worst",
        "rows",
        "weights",
        "conversion",
        "coverage",
        "thresholds",
        "execution",
        "selftest",
        "provenance",
        "glossary",
    ]


def test_ids_are_unique_and_every_link_stays_on_the_page(make_report, broken_attention):
    page = show(make_report(changes=broken_attention))
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids))
    links = [e["href"] for e in page.all("a")]
    assert len(links) > 10
    assert all(link.startswith("#") and link[1:] in ids for link in links)


def test_tables_have_captions_and_header_cells_a_scope(make_report):
    page = show(make_report())
    assert len(page.all("table")) > 8
    assert all(page.inside(table, "caption") for table in page.all("table"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    for table in page.all("table", **{"class": "rows"}):
        head = len([c for c in page.inside(table, "th") if c["scope"] == "col"])
        for row in page.inside(table, "tr"):
            if row.get("id"):
                assert len(page.inside(row, "td")) + 1 == head


def test_nothing_is_fetched_and_nothing_runs_but_the_pages_own_script(make_report, broken_attention):
    text = render_html(make_report(changes=broken_attention))
    assert set(re.findall(r"https?://[^\"'\s<]*", text)) == {"http://www.w3.org/2000/svg"}
    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not [e for e in page.elements if "style" in e or "src" in e]
    assert not {e["tag"] for e in page.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "form",
        "base",
    }
    assert not [key for e in page.elements for key in e if key.startswith("on")]
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_the_policy_names_the_style_sheet_and_the_script_and_nothing_else(make_report):
    page = show(make_report())
    policy = dict(part.split(" ", 1) for part in page.all("meta")[1]["content"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "style-src": hash_source(page.one("style")["text"]),
        "script-src": hash_source(page.one("script")["text"]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def hash_source(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_every_column_head_is_in_the_glossary_with_a_hint(make_report, broken_attention):
    override = Override(probe="head", dtype="bf16", criterion="direct", limit=3.0, reason="another kernel")
    page = show(make_report(changes=broken_attention, cause=cause_at("explained"), overrides=[override]))
    heads = [e for e in page.all("th", scope="col") if "id" not in e]
    assert len(heads) > 60
    for cell in heads:
        (link,) = page.inside(cell, "a")
        assert link["title"].endswith(".")
        (entry,) = [e for e in page.all("dt") if e.get("id") == link["href"][1:]]
        assert cell["text"].strip() in entry["text"].split(", ")


def test_the_glossary_has_no_term_twice_and_no_group_without_a_title():
    names = [name for term in GLOSSARY for name in term.names]
    assert len(names) == len(set(names))
    assert {term.group for term in GLOSSARY} == set(GROUPS)
    assert len({term.anchor for term in GLOSSARY}) == len(GLOSSARY)


def test_a_row_is_called_by_its_probe_unless_that_might_be_anything(make_report):
    good = make_report().rows[0]
    names = ("with space", 'a"b', "", "ä", "x" * 121, "embeddings")
    rows = [good.model_copy(update={"probe": name}) for name in names]
    report = make_report()
    page = show(report.model_copy(update={"rows": (*report.rows, *rows)}))
    ids = [tr["id"] for tr in page.all("tr") if (tr.get("id") or "").startswith("fp32-isolated")]
    assert ids[:2] == ["fp32-isolated-embeddings", "fp32-isolated-layers.0.attn_norm"]
    assert ids[-6:] == [f"fp32-isolated~{n}" for n in range(20, 26)]


def test_the_banner_says_that_limits_are_the_projects_own(make_report):
    assert "this project's own" not in show(make_report()).banner["text"]
    override = Override(
        probe="layers.*.mlp", dtype="bf16", mode="isolated", criterion="direct", limit=3.5, reason="another kernel"
    )
    page = show(make_report(overrides=[override]))
    assert "1 limit of this project's own in place of the installed ones" in page.banner["text"]
    thresholds = page.one("section", id="thresholds")["text"]
    assert re.search(r"layers\.\*\.mlpbf16forwardown errordirect3\.53another kernel", thresholds)
    assert page.cells("bf16-isolated-layers.1.mlp")[0] == "✓ pass own limit: direct"
    assert page.cells("bf16-accumulated-layers.1.mlp")[0] == "✓ pass"
    assert "every row was judged by the installed limits" in show(make_report()).one("section", id="thresholds")["text"]


def test_how_the_candidate_was_converted_is_told(make_report):
    report = make_report()
    told = show(report).one("section", id="conversion")["text"]
    for expected in ("27 tensors in 1 file, 0.6 MB", "kept as it was", "every bit of every tensor can be recovered",
                     "copied as they are: 10, transposed: 17, tied to another weight: 1",
                     "decoder.weight is model.embeddings.tok_embeddings.weight", "Left outnothing",
                     "27 tensors were read back from the disk"):  # fmt: skip
        assert expected in told
    other = report.conversion.model_copy(
        update={"dtype": "bf16", "lossless": False, "operations": {}, "table_sha256": "e" * 64, "tied": (),
                "dropped": ("head.dense.weight",), "proofs": ()}
    )  # fmt: skip
    told = show(report.model_copy(update={"conversion": other})).one("section", id="conversion")["text"]
    for expected in ("cast to bf16", "some bits cannot be recovered", "not the one this report was made with",
                     "not counted", "Tiednone", "Left outhead.dense.weight", "written— nothing"):  # fmt: skip
        assert expected in told
    told = show(report.model_copy(update={"conversion": None})).one("section", id="conversion")["text"]
    assert "has no conversion manifest" in told


def test_columns_without_a_single_value_are_left_out(make_report):
    report = make_report(fixture=None)
    rows = [row.model_copy(update={"padiff_equal": None, "contract": False, "contract_limit": None})
            for row in report.rows]  # fmt: skip
    page = show(report.model_copy(update={"rows": tuple(rows)}))
    heads = [e["text"] for e in page.inside(page.all("table", **{"class": "rows"})[0], "th") if e["scope"] == "col"]
    assert "PaDiff says" not in heads
    assert "contract limit" not in heads
    assert len(page.cells("fp32-isolated-embeddings")) + 1 == len(heads) == 10
    assert "No row is under the contract" in page.one("section", id="rows")["text"]


def test_equal_reports_give_equal_pages(make_report):
    assert render_html(make_report()) == render_html(make_report())


def test_every_row_is_on_the_page_with_its_status_in_words(make_report, broken_attention):
    report = make_report(changes=broken_attention)
    page = show(report)
    shown = [
        (page.inside(tr, "th")[0]["text"], page.inside(tr, "td")[0]["text"].split()[-1])
        for tr in page.all("tr")
        if re.match(r"(fp32|bf16)-(isolated|accumulated)-", tr.get("id") or "")
    ]
    assert shown == [(row.probe, row.status) for row in report.rows]


def test_a_pass_says_so_plainly(make_report):
    page = show(make_report())
    assert "✓ PASS" in page.banner["text"]
    assert "0: CI may merge" in page.banner["text"]
    assert "80 of 80 compared: 80 pass" in page.banner["text"]
    assert "No row fails" in page.one("section", id="first")["text"]
    assert not page.all("b", **{"class": "fail"})


def test_a_fail_says_so_and_names_where_to_look(make_report, broken_attention):
    report = make_report(changes=broken_attention, hints=("compare the window",))
    page = show(report)
    assert "✗ FAIL" in page.banner["text"]
    assert "PASS" not in page.one("h1")["text"]
    assert "FAIL" in page.banner["class"].split()
    assert "1: CI must not merge" in page.banner["text"]
    assert "80 of 80 compared: 14 fail, 66 pass" in page.banner["text"]
    first = page.one("section", id="first")
    assert "layers.1.attn" in first["text"]
    assert "fp32, own error, fail" in first["text"]
    beyond = [cell["text"] for cell in page.inside(page.inside(first, "table")[0], "td")]
    assert beyond[:3] == ["4.00e-03", "1.00e-05", "400"]
    assert "fp32: attn of layer 1 alone" in first["text"]
    assert "compare the window" in first["text"]
    link = page.inside(first, "a")[0]
    assert "layers.1.attn" in page.one("tr", id=link["href"][1:])["text"]
    assert page.title.startswith("FAIL: ")


def cause_at(level, **fields):
    tried = (Tried(name="masks swapped", value="", ratio=3e-6), Tried(name="window width", value="17", ratio=0.75))
    values = {"statement": "the masks are swapped", "residual": 0.25, "ratio": 3e-6, "rounding": 1e-7, "tried": tried}
    return Cause(probe="layers.1.attn", dtype="fp32", level=level, **(values | fields))


@pytest.mark.parametrize(
    ("level", "heading"),
    [("explained", "Cause"), ("partial", "Possible cause"), ("unexplained", "Cause not known")],
)
def test_the_cause_stands_by_the_first_failing_layer_with_what_was_considered(
    make_report, broken_attention, level, heading
):
    page = show(make_report(changes=broken_attention, cause=cause_at(level)))
    section = page.one("section", id="first")
    headings = [element["text"] for element in page.inside(section, "h3")]
    last = ["Next", "Run it again"]  # fp32 alone shows it too
    if level == "explained":
        assert headings == ["Cause", "Seen first at", "Wrong by themselves", *last]
    else:
        assert headings == ["Wrong by themselves", heading, "Where to look", *last]
    assert "the masks are swapped" in section["text"]
    assert ("explains all but 3.0e-06" in section["text"]) == (level == "explained")
    _, table = page.inside(section, "table")  # the first is of the limits it exceeds
    assert [cell["text"] for cell in page.inside(table, "td")] == ["— only one", "3.00e-06", "17", "7.50e-01"]
    (folded,) = page.inside(section, "details")
    assert "open" not in folded


@pytest.mark.parametrize("cause", [None, cause_at("structural")])
def test_without_a_cause_beyond_the_finding_none_is_shown(make_report, broken_attention, cause):
    page = show(make_report(changes=broken_attention, cause=cause))
    headings = [element["text"] for element in page.inside(page.one("section", id="first"), "h3")]
    assert headings == ["Wrong by themselves", "Where to look", "Next", "Run it again"]


def test_only_groups_with_something_wrong_are_open(make_report, broken_attention):
    page = show(make_report(changes=broken_attention))
    groups = page.inside(page.one("section", id="rows"), "details")
    assert ["open" in group for group in groups] == [True, True, False, False]


def test_a_row_that_does_not_pass_is_followed_by_why(make_report, broken_attention):
    page = show(make_report(changes=broken_attention))
    rows = [e for e in page.all("tr") if e.get("id") or "why" in (e.get("class") or "")]
    position = next(n for n, row in enumerate(rows) if row.get("id") == "fp32-isolated-layers.1.attn")
    assert "the most rounding explains" in rows[position + 1]["text"]
    assert "its error against the float64 oracle is the reference's " in rows[position + 1]["text"]
    (cell,) = page.inside(rows[position + 1], "td")
    assert int(cell["colspan"]) == len(page.cells("fp32-isolated-layers.1.attn")) + 1


@pytest.mark.parametrize(("fixture", "exit_code", "words"), [("tiny", 1, "does not accept"), (None, 0, "accepts")])
def test_an_explained_report_says_what_the_policy_makes_of_it(make_report, fixture, exit_code, words):
    changes = {("final_norm", "bf16", "accumulated"): {"mean_abs": 1.5e-3}}
    report = make_report(changes=changes, fixture=fixture)
    assert (report.verdict, report.exit_code) == ("EXPLAINED", exit_code)
    page = show(report)
    assert "≈ EXPLAINED" in page.banner["text"]
    assert (
        f"1 row over the contract, by no more than rounding explains; the policy {report.policy} {words}"
        in (page.banner["text"])
    )
    assert "First layer over the contract" in page.one("section", id="first")["text"]


def test_what_was_not_compared_never_looks_passed(make_report):
    report = make_report(changes={("head", "bf16", "accumulated"): None}, needs={"sliding window": False})
    page = show(report)
    assert "? NOT_COMPARED" in page.banner["text"]
    assert "This is not a pass" in page.banner["text"]
    assert "79 of 80 rows" in page.banner["text"]
    coverage = page.one("section", id="coverage")["text"]
    assert "head (bf16, accumulated): there is no record of this probe" in coverage
    assert "the inputs do not exercise: sliding window" in coverage
    assert "Nothing is missing" not in coverage


def test_a_number_that_does_not_exist_is_a_dash_with_its_reason(make_report):
    none = dict.fromkeys(
        ("mean_abs", "max_abs", "rel_l2", "equal_share", "worst_index", "worst_candidate", "worst_reference")
    )
    changes = {
        ("head", "fp32", "isolated"): {"observation": "nonfinite", "reason": "12 values are NaN", **none},
        ("logits", "fp32", "isolated"): None,
        ("embeddings", "fp32", "isolated"): {"rel_l2": None},
    }
    page = show(make_report(changes=changes))
    nonfinite = page.cells("fp32-isolated-head")
    assert nonfinite[0] == "✗ nonfinite"
    assert [cell for n, cell in enumerate(nonfinite[1:10], 1) if n != 2] == [
        "— not finite",
        "— not finite",
        "— not judged",
        "— not judged",
        "— not measured",
        "— not finite",
        "— not finite",
        "— not finite",
    ]
    assert "12 values are NaN" in page.one("section", id="rows")["text"]
    missing = page.cells("fp32-isolated-logits")
    assert missing[0] == "✗ missing"
    assert missing[1] == missing[3] == "— not seen"
    assert missing[10] == "— nothing", "PaDiff's opinion"
    assert page.cells("fp32-isolated-embeddings")[3] == "— not computable"
    assert page.cells("bf16-accumulated-layers.0.attn_norm")[2] == "— no contract"
    assert "None" not in page.one("main")["text"]


def test_no_cell_is_blank(make_report, broken_attention):
    page = show(make_report(changes=broken_attention))
    assert all(cell["text"].strip() for cell in [*page.all("td"), *page.all("th"), *page.all("dd")])


def test_zero_and_nearly_equal_are_not_rounded_into_each_other(make_report):
    changes = {
        ("embeddings", "fp32", "isolated"): {"mean_abs": 0.0, "equal_share": 1.0},
        ("layers.0.attn", "fp32", "isolated"): {"mean_abs": 1e-300, "equal_share": 0.999999},
        ("layers.0.mlp", "fp32", "isolated"): {"equal_share": 0.0},
        ("layers.1.mlp", "fp32", "isolated"): {"equal_share": 0.000001},
    }
    page = show(make_report(changes=changes))
    assert page.cells("fp32-isolated-embeddings")[1] == "0"
    assert page.cells("fp32-isolated-embeddings")[8] == "100 %"
    assert page.cells("fp32-isolated-layers.0.attn")[1] == "1.00e-300"
    assert page.cells("fp32-isolated-layers.0.attn")[8] == "99.9 %"
    assert page.cells("fp32-isolated-layers.0.mlp")[8] == "0 %"
    assert page.cells("fp32-isolated-layers.1.attn_norm")[8] != "0 %"


def test_the_worst_element_shows_both_values(make_report):
    page = show(make_report())
    assert page.cells("fp32-isolated-embeddings")[9] == "[0, 17, 14]: -2.06364655 / -2.06364703"


def test_the_noise_ratio_is_shown_or_said_why_there_is_none(make_report):
    changes = {
        ("head", "fp32", "isolated"): {"reference_error": 0.0, "reference_rms": 0.0},
        ("logits", "fp32", "isolated"): {"candidate_error": None},
        ("output", "fp32", "isolated"): None,
    }
    report = make_report(changes=changes)
    page = show(report)
    assert page.cells("fp32-isolated-layers.0.attn_norm")[6] == "1.25e+00"
    assert page.cells("fp32-isolated-embeddings")[6] == "— below rounding"
    assert page.cells("fp32-isolated-head")[6] == "— without end"
    assert page.cells("fp32-isolated-logits")[6] == page.cells("fp32-isolated-output")[6] == "— not measured"
    assert "not measured in this report" not in page.one("section", id="rows")["text"]
    heads = page.inside(page.all("table", **{"class": "rows"})[0], "th")
    assert "noise ratio" in [cell["text"] for cell in heads]


def test_a_row_that_only_noise_fails_is_a_failure_with_its_reason(make_report):
    report = make_report(changes={("layers.1.mlp", "bf16", "isolated"): {"candidate_error": 0.0098}})
    page = show(report)
    assert (report.verdict, report.first_failing.probe) == ("FAIL", "layers.1.mlp")
    assert "80 of 80 compared: 1 fail, 79 pass" in page.banner["text"]
    reason = "its error against the float64 oracle is the reference's 8.53 times, more than 1.5"
    beyond = page.inside(page.inside(page.one("section", id="first"), "table")[0], "td")
    assert [cell["text"] for cell in beyond] == ["8.53e+00", "1.50e+00", "5.69"]
    assert page.one("section", id="rows")["text"].count(reason) == 1
    worst = page.inside(page.one("section", id="worst"), "tr")
    assert sum("fail" in row["text"] and "layers.1.mlp" in row["text"] for row in worst) == 1


def test_without_an_oracle_noise_is_said_to_be_missing_once(make_report):
    report = make_report()
    without = {"candidate_error": None}
    changes = {(row.probe, row.dtype, row.mode): without for row in report.rows}
    page = show(make_report(changes=changes))
    assert "? NOT_COMPARED" in page.banner["text"]
    assert page.one("section", id="rows")["text"].count("not measured in this report") == 1
    assert "noise ratio" not in page.all("table", **{"class": "rows"})[0]["text"]


def test_weights_that_differ_are_listed_and_absent_checks_told(make_report):
    difference = WeightDifference(
        paddle="layers.1.attn.Wo.weight",
        hf="layers.1.attn.Wo.weight",
        probe="layers.1.attn",
        dtype="fp32",
        problem="values",
        differing=4032,
        elements=4096,
        max_abs=0.08,
        looks="transposed",
    )
    report = make_report(differences=[difference])
    page = show(report)
    weights = page.one("section", id="weights")["text"]
    assert "✗ FAIL" in page.banner["text"]
    assert "4032 of 4096" in weights
    assert "transposed" in weights
    assert "weights" in page.one("section", id="first")["text"]
    page = show(report.model_copy(update={"weights": report.weights[:1]}))
    assert "✗ not compared" in page.one("section", id="weights")["text"]


def test_execution_and_provenance_are_stated(make_report):
    report = make_report()
    page = show(report)
    execution = page.one("section", id="execution")["text"]
    assert "emulated" in execution
    assert "Not Paddle's own bf16 kernels" in execution
    provenance = page.one("section", id="provenance")["text"]
    for expected in (
        "a" * 64,
        "b" * 64,
        "c" * 64,
        "d" * 64,
        "torch 2.13.0",
        "avx2, fma",
        "ONEDNN_MAX_CPU_ISA=AVX2",
        "2 threads",
        "lengths 192, 150",
        "full_attention, sliding_attention",
        report.content_sha256,
    ):
        assert expected in provenance
    assert report.command in page.one("code", id="command")["text"]
    assert "agreed" in page.one("section", id="thresholds")["text"]


def test_hostile_text_stays_text_wherever_it_comes_from(make_report):
    good = make_report()
    extra = good.rows[0].model_copy(update={"probe": HOSTILE, "observation": "extra", "reason": f"extra {HOSTILE}"})
    difference = WeightDifference(
        paddle=HOSTILE, hf=HOSTILE, probe=HOSTILE, dtype="fp32", problem="values", looks=HOSTILE
    )
    model = good.model.model_copy(
        update={
            "name": HOSTILE,
            "head": HOSTILE,
            "revision": HOSTILE,
            "candidate": HOSTILE,
            "architecture": HOSTILE,
            "config": {HOSTILE: HOSTILE, "list": [HOSTILE]},
            "candidate_config_differences": (HOSTILE,),
        }
    )
    environment = good.environment.model_copy(
        update={
            "versions": {HOSTILE: HOSTILE},
            "pins": {HOSTILE: HOSTILE},
            "cpu": HOSTILE,
            "cpu_flags": (HOSTILE,),
        }
    )
    override = Override(probe=HOSTILE, dtype="fp32", criterion="direct", limit=3.0, reason=HOSTILE)
    report = make_report(
        extra=[extra],
        overrides=[override],
        conversion=good.conversion.model_copy(update={"proofs": (HOSTILE,), "operations": {HOSTILE: 1}}),
        differences=[difference],
        model=model,
        environment=environment,
        command=HOSTILE,
        hints=(HOSTILE,),
        tool_version=HOSTILE,
        created=HOSTILE,
        timings_s={HOSTILE: 1.0},
    )
    text = render_html(report, selftest_notes=[HOSTILE])
    assert text.count("<script") == 1
    assert "<img" not in text
    page = Page(text)
    assert "alert" not in page.one("script")["text"]
    assert not page.all("img")
    assert not [key for e in page.elements for key in e if key.startswith("on")]
    for section in ("first", "rows", "weights", "conversion", "thresholds", "selftest", "provenance"):
        assert HOSTILE in page.one("section", id=section)["text"], section
    assert HOSTILE in page.banner["text"]
    assert "alert(1)" in page.title
    assert "49" not in page.one("code", id="command")["text"]


def test_a_base_sized_page_stays_under_a_megabyte(make_report):
    report = make_report(layers=22)
    assert len(report.rows) == 460
    assert 200_000 < len(render_html(report).encode()) < 1_000_000


def test_a_base_sized_page_on_which_everything_fails_does_too(make_report):
    report = make_report(layers=22)
    changes = {(r.probe, r.dtype, r.mode): {"mean_abs": 0.5, "rel_l2": 0.9} for r in report.rows}
    text = render_html(make_report(layers=22, changes=changes))
    assert text.count("✗ fail") > 460
    assert len(text.encode()) < 1_000_000
