"""A process that has imported everything, and forks a reader of a file for each line that it reads; the file is then changed in
place, under the reader's threads.

One line of JSON in, `{"path": PATH, "reader": "loader" | "verify", "after": SECONDS, "change": "truncate" | "zero" | "copy",
"at": BYTE, "other": PATH}`; one out: the reader's exit code (negative: the signal that ended it), its error, and the seconds from
the change to its end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fastretina.beton.verify import verify_beton
from fastretina.errors import FastretinaError
from fastretina.loading.loader import Loader

SETTINGS = {"batch_size": 8, "resolution": 64, "workers": 3}


def read_until_it_fails(job: dict[str, Any], output: int) -> None:
    """Epoch after epoch, or check after check. Never returns."""
    code = 99
    try:
        os.write(output, b"\n")  # reading begins
        if job["reader"] == "verify":
            while not (report := verify_beton(job["path"], workers=3)).bad:
                pass
            os.write(output, str(report).encode())
        else:
            with Loader(job["path"], **SETTINGS) as loader:
                while True:
                    for _ in loader:
                        pass
        code = 1
    except FastretinaError as error:
        os.write(output, f"{type(error).__name__}: {error}".encode())
        code = error.exit_code
    except BaseException as error:
        os.write(output, f"unforeseen {type(error).__name__}: {error}".encode())
    os._exit(code)


def change(job: dict[str, Any]) -> None:
    """What nobody should do to a file that is in use."""
    path = Path(job["path"])
    if job["change"] == "truncate":
        os.truncate(path, job["at"])
    elif job["change"] == "zero":
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    else:  # as cp does
        with path.open("wb") as file:
            file.write(Path(job["other"]).read_bytes())


def main() -> None:
    """Until standard input ends."""
    with Loader(sys.argv[1], **SETTINGS) as loader:
        for _ in loader:  # compiles the kernels
            pass
    for line in sys.stdin:
        job = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            read_until_it_fails(job, writing)
        os.close(writing)
        os.read(reading, 1)
        time.sleep(job["after"])
        change(job)
        changed = time.monotonic()
        with os.fdopen(reading, "rb") as pipe:
            error = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "error": error, "seconds": time.monotonic() - changed}), flush=True)


if __name__ == "__main__":
    main()
