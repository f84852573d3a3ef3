#!/usr/bin/env bash
# The GPU session rehearsed where there is no GPU, from nothing: a GPU machine's Python, its versions and only its packages
# (gpu_machine.txt), the wheels that are carried there, and a clean copy of what is committed.
#
#   bash benchmarks/rehearse.sh [FOLDER]        FOLDER: where to work, and where $OUT of each call stays; default: a new one
#
# Fails where a step of the session does, where a result is missing, or a test. Takes 15 minutes on two cores, a quarter of it for
# packages (a FOLDER of an earlier rehearsal has them). Environment: PYTHON312=an interpreter; KIT=what is carried, a folder with
# whl/*.whl and perhaps an env.sh that unpacks them; default .gpu if it is there, else the wheels are downloaded.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="${1:-$(mktemp -d)}"; mkdir -p "$work"; work="$(cd "$work" && pwd)"
say() { printf '\n##### %s\n' "$*"; }

python="${PYTHON312:-}"
for candidate in "$HOME"/.pyenv/versions/3.12*/bin/python python3.12; do
  [ -n "$python" ] || ! "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || python="$candidate"
done
[ -n "$python" ] || { echo "rehearse: needs CPython 3.12; name it: PYTHON312=/path/to/python" >&2; exit 1; }

say "a machine with $("$python" --version)"
if [ ! -e "$work/.ready" ]; then
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q --disable-pip-version-check -r "$root/benchmarks/gpu_machine.txt"
  touch "$work/.ready"
fi
kit="${KIT:-$root/.gpu}"
if [ ! -d "$kit/whl" ]; then
  kit="$work/kit"
  "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$kit/whl" \
    'nvidia-nvimgcodec-cu13==0.9.0.20' 'nvidia-nvjpeg>=13.0,<13.1' simplejpeg tyro docstring-parser typeguard shtab
fi
rm -rf "$work/tree" "$work/site" "$work"/out-*
git clone -q "$root" "$work/tree"
cd "$work/tree"
export PATH="$work/venv/bin:$PATH" PYTHON="$work/venv/bin/python" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
if [ -e "$kit/env.sh" ]; then
  export FASTRETINA_SITE="$work/site"
  set +u; source "$kit/env.sh"; set -u
else
  # As there: without an index, without what they would need, in a folder of their own.
  python3 -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --target "$work/site" "$kit"/whl/*.whl
  export PYTHONPATH="$work/site:$PWD"
fi
python3 -c 'import numpy, torch, torchvision, triton; print("torch", torch.__version__, "torchvision", torchvision.__version__, "Triton", triton.__version__, "numpy", numpy.__version__)'

failed=()
for call in 1 2 3; do
  say "call $call"
  out="$work/out-$call"; mkdir -p "$out"
  DEVICE=cpu TRITON_INTERPRET=1 COUNT=24 SIZE=32 BATCH=4 ROUNDS=2 STEPS=3 LIMIT=900 OUT="$out" DATA="$work/tree/data.beton" \
    bash benchmarks/gpu_session.sh "$call" || failed+=("call $call: exit $?")
  while read -r line; do failed+=("call $call: $line"); done < <(python3 - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
for name, step in json.loads((out / "session.json").read_text()).items():
    if step["exit"] != 0:
        print(f"{name} ended with {step['exit']}")
for path in out.glob("*.json"):
    json.loads(path.read_text())
files = [path for path in out.rglob("*") if path.is_file()]
if len(files) > 8:
    print(f"leaves {len(files)} files, and 8 come back: {', '.join(sorted(path.name for path in files))}")
PY
)
done

say "the tests of what runs on a GPU, with these versions"
mapfile -t files < <(grep -lE '\bDEVICES|mark\.gpu' tests/*/test_*.py)
python3 -m pytest -q -W default -p no:cacheprovider -n 2 "${files[@]}" || failed+=("tests")
say "the kernel's machine code, with this Triton"
python3 benchmarks/kernel_code.py --json "$work/kernel-code.json" || failed+=("kernel_code.py")

if [ ${#failed[@]} -gt 0 ]; then say "FAILED: $(printf '%s; ' "${failed[@]}")"; exit 1; fi
say "all of it ran"
