"""`gate`: saved reports are judged again, and nothing edited, cut or absent gets through."""

import json

import pytest

from modernbert_align.report.schema import Report


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Folder with fp32 and bf16 reports of tiny."""
    from modernbert_align.cli import main

    folder = tmp_path_factory.mktemp("reports")
    for dtype in ("fp32", "bf16"):
        assert main(["diff", "--model", "tiny", "--dtype", dtype, "--report-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def report(reports):
    return reports / "diff-tiny-masked_lm-bf16.json"


def resealed(path, change):
    """A report changed by someone who also made the digest fit."""
    document = json.loads(path.read_text())
    change(document)
    sealed = Report.model_validate_json(json.dumps(document)).sealed()
    return json.dumps(sealed.model_dump(mode="json"))


def test_untouched_reports_pass(cli, reports):
    code, out, _ = cli("gate", *sorted(reports.glob("*.json")), "--require", "model=tiny,dtype=fp32,dtype=bf16")
    assert code == 0
    assert "104 of 104 rows" in out


def test_json_outcome_is_alone_on_stdout(cli, report):
    code, out, _ = cli("gate", report, "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 0
    assert document["reports"][0]["verdict"] == "PASS"


def test_quiet_says_only_what_stops_the_gate(cli, reports):
    every = sorted(reports.glob("*.json"))
    assert cli("gate", *every, "-q")[1] == "gate: exit 0\n"
    code, out, _ = cli("gate", *every, "-q", "--require", "model=base,dtype=fp32")
    assert (code, len(out.splitlines())) == (5, 2)
    assert "no report covers it" in out


@pytest.mark.parametrize(
    ("require", "code"),
    [
        ("model=tiny,dtype=bf16", 0),
        ("model=tiny,head=masked_lm,dtype=fp32", 0),
        ("model=base,dtype=fp32", 5),
        ("model=tiny,head=base,dtype=fp32", 5),
    ],
)
def test_requirement_that_no_report_covers_exits_5(cli, report, require, code):
    assert cli("gate", report, "--require", require)[0] == code


def test_fp32_report_does_not_cover_bf16(cli, reports):
    path = reports / "diff-tiny-masked_lm-fp32.json"
    assert cli("gate", path, "--require", "model=tiny,dtype=bf16")[0] == 5


@pytest.mark.parametrize(
    "text", ["base", "model=", "model=a,model=b,dtype=fp32", "model=a", "model=a,dtype=int8", "x=1"]
)
def test_malformed_requirement_is_refused(cli, report, text):
    code, _, err = cli("gate", report, "--require", text)
    assert code == 2
    assert err.startswith("error: --require")


@pytest.mark.parametrize("where", ["a number in a row", "the verdict", "a dropped row", "a tolerance"])
def test_edited_report_is_refused(cli, report, tmp_path, where):
    document = json.loads(report.read_text())
    if where == "a number in a row":
        document["rows"][3]["mean_abs"] = 1e-9
    elif where == "the verdict":
        document["verdict"] = "EXPLAINED"
    elif where == "a dropped row":
        del document["rows"][3]
    else:
        document["thresholds"][0]["value"] = 1.0
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(document))
    code, _, err = cli("gate", path)
    assert code == 2
    assert "changed after it was written" in err


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_report_is_refused(cli, report, tmp_path, share):
    text = report.read_text()
    path = tmp_path / "cut.json"
    path.write_text(text[: int(len(text) * share)])
    assert cli("gate", path)[0] == 2


def test_absent_report_is_refused(cli, tmp_path):
    assert cli("gate", tmp_path / "none.json")[0] == 2


def drop_row(document):
    del document["rows"][3]


def drop_dtype(document):
    document["rows"] = [row for row in document["rows"] if row["dtype"] == "fp32"]


def empty_metrics(document):
    document["rows"][3].update(mean_abs=None, rel_l2=None)


def no_elements(document):
    document["rows"][3]["elements"] = 0


def large_error(document):
    document["rows"][3].update(mean_abs=1.0, rel_l2=1.0, status="pass", failed=[])


def large_error_and_lax_limits(document):
    document["rows"][3].update(mean_abs=1.0, rel_l2=1.0, contract_limit=10.0, direct_limit=10.0, contract=False)
    document["thresholds"][0]["value"] = 10.0


def weights_not_compared(document):
    document["weights"][0]["compared"] = 3


def weight_check_gone(document):
    del document["weights"][1]


def inflated_null(document):
    document["rows"][3].update(mean_abs=1.0, rel_l2=1.0, null_rel_l2=10.0)


def noisy(document):
    document["rows"][3].update(candidate_error=1.0, status="pass", failed=[])


def noisy_and_said_not_to_be(document):
    document["rows"][3].update(candidate_error=1.0, noise_ratio=1.0, noise_limit=1e9)
    for threshold in document["thresholds"]:
        if threshold["criterion"] == "noise":
            threshold["value"] = 1e9


def exact_reference(document):
    document["rows"][3].update(candidate_error=1.0, reference_error=0.0, noise_ratio=None)


def noisy_beside_a_wide_null(document):
    document["rows"][3].update(candidate_error=1.0, null_rel_l2=10.0)


def only_the_ratio_edited(document):
    document["rows"][3].update(noise_ratio=99.0, noise_limit=0.1, failed=["noise"], status="fail")


def only_the_ratio_dropped(document):
    document["rows"][3].update(noise_ratio=None, noise_limit=None)


def no_oracle(document):
    for row in document["rows"]:
        row.update(candidate_error=None, reference_error=None)


def no_error_of_the_reference(document):
    document["rows"][3]["reference_error"] = None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (drop_row, 5),
        (noisy, 1),
        (noisy_and_said_not_to_be, 1),
        (exact_reference, 1),
        (noisy_beside_a_wide_null, 1),
        (only_the_ratio_edited, 0),
        (only_the_ratio_dropped, 0),
        (no_oracle, 5),
        (no_error_of_the_reference, 5),
        (drop_dtype, 5),
        (empty_metrics, 5),
        (no_elements, 5),
        (large_error, 1),
        (large_error_and_lax_limits, 1),
        (weights_not_compared, 5),
        (weight_check_gone, 5),
        (inflated_null, 1),
    ],
)
def test_verdict_is_made_anew_whatever_the_file_says(cli, report, tmp_path, change, code):
    path = tmp_path / "resealed.json"
    path.write_text(resealed(report, change))
    assert json.loads(path.read_text())["verdict"] == "PASS"
    assert cli("gate", path)[0] == code


def duplicate_row(document):
    document["rows"].append(document["rows"][3])


def other_architecture(document):
    document["model"]["config"]["num_hidden_layers"] = 1
    document["model"]["config"]["layer_types"] = ["full_attention"]


def other_inputs(document):
    document["inputs"]["lengths"] = [192, 192]


def false_fixture(document):
    document["model"]["fixture"] = "base"


@pytest.mark.parametrize("change", [duplicate_row, other_architecture, other_inputs, false_fixture])
def test_report_that_contradicts_itself_is_refused(cli, report, tmp_path, change):
    path = tmp_path / "resealed.json"
    path.write_text(resealed(report, change))
    code, _, err = cli("gate", path)
    assert code == 2
    assert err.startswith("error: ")


def test_a_folder_called_like_a_fixture_is_not_the_fixture(cli, reports, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(resealed(reports / "diff-tiny-masked_lm-fp32.json", pretend("directory")))
    assert cli("gate", path)[0] == 0
    assert cli("gate", path, "--require", "model=tiny,dtype=fp32")[0] == 5


def pretend(kind):
    def change(document):
        document["model"].update(kind=kind, fixture=None)

    return change


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("lengths", [0, 0])])
def test_inputs_that_cannot_be_are_one_line(cli, report, tmp_path, key, value):
    path = tmp_path / "r.json"
    path.write_text(
        resealed(report, lambda document: (pretend("directory")(document), document["inputs"].update({key: value})))
    )
    code, _, err = cli("gate", path)
    assert code == 2
    assert "Traceback" not in err
