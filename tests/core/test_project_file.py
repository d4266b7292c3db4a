"""The project file: found, checked, and nothing in it ignored."""

import pytest

from modernbert_align.core.project_file import Option, check_environment, find_project_file, read_project_file
from modernbert_align.errors import SettingsError

KNOWN = {
    ("diff",): (
        Option(key="model", parameter="model", kind="text"),
        Option(key="report-dir", parameter="report_dir", kind="path"),
        Option(key="steps", parameter="steps", kind="number"),
        Option(key="json", parameter="as_json", kind="flag"),
        Option(key="format", parameter="format", kind="text"),
    ),
    ("gate",): (
        Option(key="require", parameter="require", kind="list"),
        Option(key="baseline", parameter="baseline", kind="paths"),
    ),
    ("table", "show"): (Option(key="head", parameter="head", kind="text"),),
}
LIMIT = """
[[tolerance]]
probe = "layers.*.mlp"
dtype = "bf16"
criterion = "direct"
limit = 3
reason = "the fused kernel of our build rounds twice"
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="modernbert-align.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_values_reach_the_parameters_of_their_commands(written, tmp_path):
    path = written(
        '[diff]\nmodel = "tiny"\nreport-dir = "out"\nsteps = 4\njson = true\nformat = ["json", "html"]\n'
        '[gate]\nrequire = "model=tiny,dtype=fp32"\nbaseline = ["b/*.json"]\n[table.show]\nhead = "base"\n' + LIMIT
    )
    found = read_project_file(path, KNOWN)
    assert found.defaults == {
        "diff": {
            "model": "tiny",
            "report_dir": str(tmp_path / "out"),
            "steps": 4,
            "as_json": True,
            "format": "json,html",
        },
        "gate": {"require": ["model=tiny,dtype=fp32"], "baseline": [str(tmp_path / "b" / "*.json")]},
        "table": {"show": {"head": "base"}},
    }
    assert [(o.probe, o.limit, o.mode, o.phase) for o in found.overrides] == [("layers.*.mlp", 3.0, None, "forward")]


def test_pyproject_says_the_same_in_its_own_section(written):
    path = written('[project]\nname = "x"\n[tool.modernbert-align.diff]\nmodel = "tiny"\n', "pyproject.toml")
    assert read_project_file(path, KNOWN).defaults == {"diff": {"model": "tiny"}}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[dif]\nmodel = 'tiny'\n", "unknown section [dif]", "`diff`"),
        ("[diff]\nmodle = 'tiny'\n", "unknown key `modle` in [diff]", "`model`"),
        ("[diff]\nreport_dir = 'x'\n", "unknown key `report_dir`", "`report-dir`"),
        ("[table.shwo]\nhead = 'base'\n", "unknown section [table.shwo]", "`show`"),
        ("model = 'tiny'\n", "unknown section [model]", "known are"),
        ("diff = 'tiny'\n", "`diff` is not a section", "[diff]"),
        ("[diff]\nmodel = 3\n", "diff.model is 3", "a text in quotes"),
        ("[diff]\nsteps = true\n", "diff.steps is True", "a whole number"),
        ("[diff]\nsteps = '3'\n", "diff.steps is '3'", "a whole number"),
        ("[diff]\njson = 1\n", "diff.json is 1", "true or false"),
        ("[diff]\nformat = []\n", "diff.format is []", "a text in quotes"),
        ("[gate]\nrequire = [1]\n", "gate.require is [1]", "a list of texts"),
        ("[diff\n", "is not valid TOML", ""),
        ("[tolerance]\nprobe = 'x'\n", "`tolerance` is not a list", "[[tolerance]]"),
        (
            LIMIT.replace('reason = "the fused kernel of our build rounds twice"', ""),
            "tolerance 1: reason",
            "reason in writing",
        ),
        (LIMIT.replace("the fused kernel of our build rounds twice", "  "), "the reason has no words", ""),
        (LIMIT.replace("= 3", '= "3"'), "tolerance 1: limit", ""),
        (LIMIT.replace("= 3", "= true"), "tolerance 1: limit", ""),
        (LIMIT.replace("limit", "limt"), "tolerance 1: limit", ""),
        (LIMIT + "modes = 'isolated'\n", "tolerance 1: modes", "`mode`"),
        (LIMIT.replace("= 3", "= inf"), "tolerance 1: limit", ""),
        (LIMIT.replace("= 3", "= 0"), "tolerance 1: limit", ""),
        (LIMIT.replace("direct", "hygiene"), "tolerance 1: criterion", ""),
        (LIMIT.replace("direct", "contract") + "phase = 'backward'\n", "about the forward phase", ""),
    ],
)
def test_what_is_not_known_is_an_error_with_a_suggestion(written, text, message, hint):
    path = written(text)
    with pytest.raises(SettingsError) as caught:
        read_project_file(path, KNOWN)
    assert message in caught.value.message
    assert path.name in caught.value.message
    assert hint in caught.value.hint


def test_the_nearest_file_is_found_and_a_foreign_pyproject_is_not(written, tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert find_project_file(inner) is None
    top = written("")
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert find_project_file(inner) == top
    near = tmp_path / "a" / "pyproject.toml"
    near.write_text("[tool.modernbert-align]\n")
    assert find_project_file(inner) == near


def test_two_files_in_one_folder_are_refused(written, tmp_path):
    written("")
    written("[tool.modernbert-align.diff]\n", "pyproject.toml")
    with pytest.raises(SettingsError, match="both configure"):
        find_project_file(tmp_path)


def test_a_misspelt_environment_variable_is_refused():
    known = {"MODERNBERT_ALIGN_DIFF_MODEL": None}
    check_environment({"HOME": "", "MODERNBERT_ALIGN_DIFF_MODEL": "tiny"}, "MODERNBERT_ALIGN_", known)
    with pytest.raises(SettingsError) as caught:
        check_environment({"MODERNBERT_ALIGN_DIF_MODEL": "tiny"}, "MODERNBERT_ALIGN_", known)
    assert "MODERNBERT_ALIGN_DIFF_MODEL" in caught.value.hint


def test_a_blank_environment_variable_does_not_empty_a_setting():
    with pytest.raises(SettingsError, match="is empty"):
        check_environment(
            {"MODERNBERT_ALIGN_GATE_REQUIRE": " "}, "MODERNBERT_ALIGN_", {"MODERNBERT_ALIGN_GATE_REQUIRE": 0}
        )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("modernbert_align.toml", "", "the file is called"),
        ("pyproject.toml", "[tool.modernbert_align]\n", "[tool.modernbert_align] is not read"),
        ("pyproject.toml", "[[tool.modernbert-align]]\n", "is not a section"),
    ],
)
def test_a_file_that_is_nearly_a_project_file_is_not_passed_over(written, tmp_path, name, text, said):
    written(text, name)
    with pytest.raises(SettingsError) as caught:
        find_project_file(tmp_path)
    assert said in caught.value.message + caught.value.hint


def test_a_project_file_that_cannot_be_read_is_not_passed_over(tmp_path):
    (tmp_path / "modernbert-align.toml").symlink_to(tmp_path / "gone.toml")
    with pytest.raises(SettingsError, match="no file that can be read"):
        find_project_file(tmp_path)


def test_a_named_pyproject_without_the_section_is_refused(written):
    path = written("[project]\n", "pyproject.toml")
    with pytest.raises(SettingsError, match="has no section"):
        read_project_file(path, KNOWN)
