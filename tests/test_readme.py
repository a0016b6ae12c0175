"""README and docs against the code: commands parse, the hunk and the list of deviations are those of the files."""

import importlib
import re
import shlex

import claim
import pytest
from conftest import ROOT, write_pictures

import report

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


@pytest.fixture(scope="module")
def results():
    return report.find([ROOT / "results"])


METHOD = dict.fromkeys("joint finetune er-1000 gr-2 gd-2 lwf noise".split(), ("frd", "kld", "acc"))
JDCL = dict.fromkeys(["jdcl-joint", "jdcl", "jdcl --one-stage", "jdcl --separate", "jdcl --no-kd", "jdcl-finetune"],
                     ("average_accuracy", "average_forgetting"))


@pytest.mark.parametrize("table, first, rows", [(0, 5, METHOD), (1, 3, JDCL)])
def test_its_numbers_are_those_of_the_results(results, table, first, rows):
    """Mean ± standard error of three seeds, rounded as they are printed."""
    block = [block for block in README.split("\n\n") if block.startswith("|")][table]
    for (place, metrics), line in zip(rows.items(), block.splitlines()[2:], strict=True):
        printed = re.findall(r"([\d.]+) ± ([\d.]+)", " ".join(line.split("|")[1:][first - 1:]))
        for metric, numbers in zip(metrics, printed, strict=True):
            target = f"classifier-{place}" if metric == "acc" and place in ("joint", "finetune") else place
            found = [value for r in results if (r.place, r.scale, r.dataset) == (target, "small", "fashion-mnist")
                     for (name, k, _), value in r.values.items() if (name, k) == (metric, r.tasks)]
            assert len(found) == 3, (place, metric)
            for number, value in zip(numbers, report.mean_and_error(found)):
                value *= 100 if "%" in report.METRICS[metric][0] else 1
                digits = len(number.partition(".")[2])
                assert abs(float(number) - value) < 0.501 * 10**-digits, (place, metric, number, value)


def test_its_verdicts_are_those_of_the_results(results, capsys):
    claim.judge(results)
    judged = [line.partition(":")[0].lower() for line in capsys.readouterr().out.splitlines()]
    told = re.findall(r"^- \*\*(\w+)\*\*:", README, re.M)
    assert sorted(judged[:8]) == sorted(told) and judged[8:12] == ["holds"] * 4, "JDCL beats its ablations"


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 200
