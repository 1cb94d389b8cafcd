"""The committed results: each report follows from its rows, by the rule that is committed."""

import json

import pytest

from diffx.experiment.claims import RESULTS, experiment_names
from diffx.experiment.listing import show_list
from diffx.experiment.report import analyse, load_rows, markdown, rule_of

REPORTS = sorted(RESULTS.glob("*/*/report.json"))


def test_there_are_some():
    assert len(REPORTS) >= 1
    assert {path.parents[1].name for path in REPORTS} <= {*experiment_names()}


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_a_report_follows_from_its_rows(path):
    report = json.loads(path.read_text())
    name, scale = path.parts[-3:-1]
    again = json.loads(json.dumps(analyse(name, scale, load_rows(path.with_name("rows.parquet")))))
    for effect, expected in zip(again["effects"], report["effects"], strict=True):
        assert effect["sentence"] == expected["sentence"]
        assert effect["estimate"] == pytest.approx(expected["estimate"], rel=1e-9, abs=1e-12)
    assert path.with_name("README.md").read_text() == markdown(report)
    if report["rule_sha256"] != rule_of(name, scale)["sha256"]:
        assert report["rule_changed"], "the rule was changed after this report"


def test_the_page_of_experiments_is_that_of_the_command(capsys, tmp_path):
    show_list(str(tmp_path / "none"), markdown=True)
    page = (RESULTS.parent / "README.md").read_text()
    assert capsys.readouterr().out.strip() in page
