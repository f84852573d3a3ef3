"""What surrounds a process: the folder that it stands in, the streams that it was given, the locale, names that are no text.

Every command runs as `python -m fastretina.X`, as a user calls it, and is to end as it does in peace, or with one line.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_runs import Tiny
from test_checkpoint import grader

from fastretina import cli, open_beton
from fastretina.models import checkpoint
from fastretina.models.checkpoint import save_checkpoint
from fastretina.models.resnet import build_model
from fastretina.training import build

# Everything that can be imported, but for what is there before Python looks into any folder, and the package itself.
INSTALLED = {name.partition("/")[0] for name in importlib.metadata.packages_distributions()}
MODULES = (sys.stdlib_module_names | INSTALLED) - {"fastretina"}


@pytest.fixture(scope="module")
def place(tiny_betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`best.safetensors`, `train.beton`, `test.beton`, and the `photos` that it was packed from."""
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint(folder / "best.safetensors", build_model("resnet18", 5), grader(1))
    (folder / "photos").symlink_to(tiny_betons.test_images)
    (folder / "test.beton").symlink_to(tiny_betons.test)
    (folder / "train.beton").symlink_to(tiny_betons.train)
    return folder


def command(name: str, place: Path, out: Path) -> list[str]:
    """A call of each command that uses all that it has: worker processes, kernels, pictures."""
    sets = ["--train", f"{place}/train.beton", "--test", f"{place}/test.beton", "--resolution", "32"]
    table = ["--images", f"{place}/photos", "--labels", f"{place}/photos/labels.csv"]
    with_best = ["--checkpoint", f"{place}/best.safetensors"]
    calls = {
        "pack": [*table, "--size", "48", "--workers", "1", "--out", f"{out}/a.beton"],
        "verify": [f"{place}/test.beton"],
        "sample": ["--out", f"{out}/sample", "--train", "2", "--test", "2", "--workers", "1"],
        "predict": [*with_best, f"{place}/photos", "--explain", f"{out}/explained"],
        "train": [*sets, "--epochs", "1", "--out", f"{out}/run"],
    }  # fmt: skip
    return ["-m", f"fastretina.{name}", *calls[name]]


def called(line: list[str], cwd: Path | None = None, **how: object) -> subprocess.CompletedProcess[bytes]:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run([sys.executable, *line], cwd=cwd, stdin=subprocess.DEVNULL, timeout=120, check=False, **how)


def slow(*names: str) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow_faults) for name in names]


@pytest.mark.parametrize("name", ["pack", "sample", *slow("predict", "train")])
def test_no_command_and_no_worker_imports_from_the_current_folder(name: str, place: Path, tmp_path: Path, tried) -> None:
    """Somebody's photographs with a cv2.py, a tqdm.py, a json.py and a thousand others among them."""
    folder, ran = tmp_path / "photographs", tmp_path / "ran"
    folder.mkdir()
    for module in MODULES:
        path = folder / f"{module}.py"
        path.write_text(f"open({str(ran)!r}, 'a').write('{module} ')\nraise SystemExit(77)\n")
    done = called(command(name, place, tmp_path), folder)
    assert not ran.exists(), ran.read_text()
    assert done.returncode == 0, done.stderr
    tried(f"current folder: {len(MODULES):,} modules of the names of all libraries")


def test_a_checkout_in_the_current_folder_runs_with_the_libraries_that_are_installed(place: Path, tmp_path: Path, tried) -> None:
    """Its worker processes find it as well."""
    (tmp_path / "fastretina").symlink_to(Path(cli.__file__).parent)
    for name in ("cv2", "json", "tqdm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)")
    # -S: what is installed in a way that only `site` knows is not, which a checkout may be.
    libraries = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    found = called(["-S", *command("sample", place, tmp_path)], tmp_path, env={"PYTHONPATH": libraries})
    assert found.returncode == 0, found.stderr
    tried("current folder: a checkout")


def closing(*descriptors: int) -> Callable[[], None]:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_closed_streams_change_nothing_but_what_is_heard(closed: tuple[int, ...], place: Path, tmp_path: Path, tried) -> None:
    assert called(command("pack", place, tmp_path), preexec_fn=closing(*closed)).returncode == 0
    with open_beton(tmp_path / "a.beton") as beton:  # and nothing that was printed
        assert len(beton) == 20
    missing = called(["-m", "fastretina.verify", "absent.beton"], tmp_path, preexec_fn=closing(*closed))
    assert (missing.returncode, missing.stdout, missing.stderr.count(b"\n")) == (1, b"", 0 if 2 in closed else 1)
    tried("streams: closed")


@pytest.mark.parametrize("name", ["verify", *slow("predict")])
def test_standard_output_that_is_full_is_one_line(name: str, place: Path, tmp_path: Path, tried) -> None:
    with Path("/dev/full").open("wb") as full:
        done = called(command(name, place, tmp_path), stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"error: standard output: No space left on device"
    assert b"Traceback" not in done.stderr
    tried("streams: full")


@pytest.mark.parametrize("words", [["verify", "--help"], ["verify", "absent.beton"], ["nonsense"]], ids=" ".join)
def test_streams_that_nobody_reads_end_in_silence(words: list[str], tmp_path: Path, tried) -> None:
    end, other = os.pipe()
    os.close(end)
    code = "import sys; from fastretina.cli import main; main(sys.argv[1:])"
    for name in ("stdout", "stderr"):
        done = called(["-c", code, *words], tmp_path, **{name: other})
        assert done.returncode == {"--help": 1 if name == "stdout" else 0, "absent.beton": 1, "nonsense": 2}[words[-1]]
        assert b"Traceback" not in (done.stderr or b"")
        assert b"Exception ignored" not in (done.stderr or b"")
        tried("streams: broken off")
    os.close(other)


STRANGE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("name", [b"\xff\xe9", "é–ü\x1b[2J\nerror: forged\r\u202e".encode()], ids=ascii)
def test_names_that_are_no_text_in_a_locale_without_letters_are_one_line(name: bytes, place: Path, tmp_path: Path, tried) -> None:
    link = tmp_path / (os.fsdecode(name) + ".beton")
    environment = {key: value for key, value in os.environ.items() if key != "HOME"} | STRANGE
    missing = called(["-m", "fastretina.verify", str(link)], env=environment)
    link.symlink_to(place / "test.beton")
    found = called(["-m", "fastretina.verify", str(link)], env=environment)
    assert (missing.returncode, found.returncode) == (1, 0), found.stderr
    for said, begins in ((missing.stderr, b"error: "), (found.stdout, b"OK: ")):
        assert said.startswith(begins)
        assert said.isascii()
        assert said.count(b"\n") == 1
        assert not set(said) & set(b"\x1b\r")
    tried("locale C: a name that is no text", 2)


def test_warnings_are_no_errors_and_nothing_depends_on_assertions_or_the_mask(place: Path, tmp_path: Path, tried) -> None:
    done = called(["-OO", "-W", "error", *command("pack", place, tmp_path)], preexec_fn=lambda: os.umask(0o077))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.beton").stat().st_mode & 0o777 == 0o600
    tried("python -OO -W error, umask 077")


def test_a_folder_that_has_been_removed_is_one_line(place: Path, tmp_path: Path, tried) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os, subprocess, sys; os.rmdir(os.getcwd()); sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    done = called(["-c", code, *command("predict", place, tmp_path)], tmp_path / "gone")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert done.stderr.startswith(b"error: the current folder has been removed")
    tried("current folder: removed")


def test_a_terminal_of_one_column_is_written_to(tried) -> None:
    done = called(["-m", "fastretina.verify", "--help"], env={**os.environ, "COLUMNS": "1", "TERM": "dumb"})
    assert done.returncode == 0
    assert b"--workers" in done.stdout
    tried("terminal: one column")


def test_a_run_of_paths_that_are_no_text_goes_on_and_is_used(
    tiny_betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tried
) -> None:
    monkeypatch.setattr(build, "build_model", lambda *_, **__: Tiny())
    monkeypatch.setattr(checkpoint, "build_model", lambda *_, **__: Tiny())
    names = {name: tmp_path / os.fsdecode(b"\xff" + name.encode()) for name in ("train.beton", "test.beton", "run", "out", "a.csv")}
    names["train.beton"].symlink_to(tiny_betons.train)
    names["test.beton"].symlink_to(tiny_betons.test)
    best = names["run"] / "best.safetensors"
    sets = ["--train", names["train.beton"], "--test", names["test.beton"], "--resolution", "32", "--workers", "1"]
    calls = [
        ["train", *sets, "--epochs", "1", "--out", names["run"]],
        ["train", "--config", names["run"] / "config.json", "--epochs", "2"],
        ["evaluate", "--checkpoint", best, "--data", names["test.beton"], "--out", names["out"]],
        ["predict", "--checkpoint", best, tiny_betons.test_images / "15_left.jpeg", "--csv", names["a.csv"]],
    ]
    for words in calls:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        assert end.value.code == 0, capsys.readouterr().err
    found = json.loads((names["out"] / "metrics.json").read_bytes())
    assert Path(found["data"]) == names["test.beton"]
    assert len((names["run"] / "results.csv").read_text().splitlines()) == 3
    assert rb"\udcff" in (names["run"] / "report.html").read_bytes()
    assert {"confusion.png", "predictions.csv"} < {entry.name for entry in names["out"].iterdir()}
    tried("paths that are not UTF-8: a run, its resume, its use", len(calls))
