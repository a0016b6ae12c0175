"""README and docs against the code: commands parse, the hunk and the list of deviations are those of the files."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, write_pictures

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "results/README.md", *ROOT.glob("docs/*.md"))}
COMMANDS = sorted(set(re.findall(r"(?:^(?:.*&& )?|`)python (\w+\.py[^\n#`]*)", "\n".join(PAGES.values()), re.M)))
assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if "$" not in c and "--rows NAME" not in c
                                     and c.split()[0] not in ("unet.py", "train_classifier.py")])  # looks into the run
def test_every_command_is_understood(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in "abcde":
        write_pictures(tmp_path / "pictures" / name, 2)
    name, *arguments = shlex.split(command.partition(" | ")[0])
    importlib.import_module(name.removesuffix(".py")).get_args(arguments)


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / path).exists(), f"{page}: {path}"


def test_the_hunk_is_in_the_scripts():
    hunk = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    gr, gd = ([line.strip() for line in (ROOT / name).read_text().splitlines()]
              for name in ("train_gr.py", "train_gd.py"))
    for line in hunk:
        assert line[1:].strip() in (gr if line[0] == "-" else gd), line


def test_the_deviations_are_those_marked_in_the_code():
    """In the files that README lists: a copy of a script, with a method of one's own, needs no line anywhere."""
    table = PAGES[ROOT / "docs/deviations.md"].splitlines()
    files = re.findall(r"`(\w+\.py)`", README[README.index("## Files"):README.index("## Licence")])
    assert len(set(files)) == 11
    for name in files:
        marked = (ROOT / name).read_text(encoding="utf-8").count("DEVIATION:")
        listed = sum(f"`{name}`" in row.split("|")[1] for row in table if row.startswith("| `"))
        assert listed == marked, f"{name} marks {marked} deviations, docs/deviations.md lists {listed}"


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 200
