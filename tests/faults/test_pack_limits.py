"""Packing where the system gives no more files, threads, processes or memory: one error, and no image is left out for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_pack import folder, jpeg, listing, picture, plain

# Each limit in a fork, which has everything imported; root, whose processes are not limited, becomes somebody else there.
PROGRAM = """
import json, os, resource, sys, threading
from pathlib import Path
from fastretina.errors import ConvertError
from fastretina.packing.pack import write_beton

job = json.loads(sys.argv[1])
os.chdir(job["out"])
for limit in job["limits"]:
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    if job["what"] == "RLIMIT_NPROC" and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(64123)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if job["what"] == "RLIMIT_AS" else 0
    resource.setrlimit(getattr(resource, job["what"]), (taken + limit, resource.RLIM_INFINITY if taken else 4096))
    try:
        summary = write_beton(f"{limit}.beton", root="../in", split="train", size=64, workers=2, **job["flags"])
        told = f"{summary.skipped} skipped"
    except ConvertError as error:
        told = str(error)
    threads = sum(thread.name.startswith("fastretina") for thread in threading.enumerate())
    try:
        children = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        children = None
    print(json.dumps([told, threads, children]), flush=True)
    os._exit(0)
"""
SKIP = {"on_bad": "skip", "max_bad": "50%"}
LIMITS = {
    "RLIMIT_NOFILE": ([5, 6, 8, 9, 30], SKIP, r"Too many open files|No file descriptors"),
    "RLIMIT_NPROC": ([1, 3, 4], SKIP, r"can't start new thread|a worker process cannot be started"),
    "RLIMIT_AS": ([1 << 20, 24 << 20, 64 << 20], {}, r"line 25: .*/99_left.jpeg: not enough memory|no thread to read"),
}


@pytest.mark.parametrize("what", LIMITS)
def test_where_the_system_gives_no_more_there_is_one_error_and_nothing_is_left(what: str, tmp_path: Path, tried) -> None:
    large = {f"{i + 50}_left.jpeg": jpeg(picture(400, 300, seed=i), progressive=True) for i in range(4)}
    folder(tmp_path / "in", plain(20) | large | {"99_left.jpeg": jpeg(picture().resize((8_000, 6_000)))})
    (limits, flags, reasons), out = LIMITS[what], tmp_path / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    tmp_path.chmod(0o755)
    job = {"what": what, "limits": limits, "out": str(out), "flags": flags}
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(job)], capture_output=True, text=True, timeout=120)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(limits), done.stderr
    assert "Traceback" not in done.stderr
    whole = [f"{limit}.beton" for limit, (told, _, _) in zip(limits, answers, strict=True) if told == "0 skipped"]
    failed = [told for told, _, _ in answers if told != "0 skipped"]
    assert failed
    assert not [told for told in failed if not re.search(reasons, told)]
    assert [(threads, children) for _, threads, children in answers] == [(0, None)] * len(limits)
    assert listing(out) == sorted(whole)
    tried("converter: no more open files, threads, processes, memory", len(limits))
