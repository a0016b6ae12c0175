"""The README against the code: its commands parse, its hunk and its list of deviations are those of the files.

Run: python -m pytest tests/test_readme.py
"""

import re
import shlex

import pytest
from conftest import ROOT

import eval_fid
import report
import train_classifier
import train_gd
import train_gr
import train_jdcl

README = (ROOT / "README.md").read_text()
SCRIPTS = {"train_gr.py": train_gr, "train_gd.py": train_gd, "train_jdcl.py": train_jdcl,
           "eval_fid.py": eval_fid, "train_classifier.py": train_classifier, "report.py": report}
RESULTS = (ROOT / "results/README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^(?:.*&& )?python (\w+\.py[^\n#]*)", README + RESULTS, re.M)))


def test_there_are_commands_to_try():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] in SCRIPTS and "$" not in c
                                     and "train_classifier.py runs" not in c])  # which looks into the run at once
def test_every_command_is_understood(command):
    """get_args takes it; what a run folder holds is not asked here."""
    name, *arguments = shlex.split(command)
    SCRIPTS[name].get_args(arguments)


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"[A-Z]{2,}_(SECONDS|TABLE)", README)
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_hunk_is_in_the_scripts():
    hunk = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    gr, gd = ([line.strip() for line in (ROOT / name).read_text().splitlines()]
              for name in ("train_gr.py", "train_gd.py"))
    for line in hunk:
        assert line[1:].strip() in (gr if line[0] == "-" else gd), line


def test_the_deviations_are_those_marked_in_the_code():
    table = README[README.index("## Deviations"):README.index("## Licence")]
    for path in sorted(ROOT.glob("*.py")):
        marked = path.read_text().count("DEVIATION:")
        listed = sum(f"`{path.name}`" in row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
        assert listed == marked, f"{path.name} marks {marked} deviations, the README lists {listed}"
