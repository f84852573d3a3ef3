#!/usr/bin/env bash
# Make .venv ready: `make setup` calls this, and so do demo, test and bench (with FASTRETINA_EXTRAS=dev,bench).
#
# Needs Linux and Python >= 3.11 with pip access to a package index. The stock FFCV peer is the only part that
# needs system packages (OpenCV and libjpeg-turbo headers); where they cannot be had, the set-up goes on without it.
# Environment: PYTHON=interpreter to build .venv from; FASTRETINA_EXTRAS=extras of pyproject.toml, besides ffcv;
# FASTRETINA_BROWSER=1 to have a browser too, if that can be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${FASTRETINA_EXTRAS:-dev}"
say() { printf 'setup: %s\n' "$*"; }

as_root=()
if [ "$(id -u)" != 0 ]; then
  if sudo -n true 2>/dev/null; then as_root=(sudo -n); else as_root=(false); fi
fi

# apt_install PACKAGE ...: 0 when all of them are there in the end.
apt_install() {
  command -v apt-get >/dev/null && [ "${as_root[*]-}" != false ] || return 1
  local log; log="$(mktemp)"
  if { DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get update -q &&
       DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -q -y --no-install-recommends "$@"; } >"$log" 2>&1; then
    rm -f "$log"
  else
    tail -n 3 "$log" >&2; rm -f "$log"; return 1
  fi
}

# For `make test`, which looks at the reports in a headless browser and skips that where there is none: one try.
browser_for_tests() {
  [ -n "${FASTRETINA_BROWSER:-}" ] && [ ! -e .venv/.browser ] || return 0
  touch .venv/.browser
  local name
  for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then return 0; fi
  done
  say "installing chromium for the tests of the reports (about 15 s, 411 MB)"
  apt_install chromium || say "going on without a browser: the tests that need one are skipped"
}

# What was installed, and from which pyproject.toml: a second call with nothing new to do ends here.
stamp=.venv/.ready
source_hash="$(cat pyproject.toml tools/setup.sh | sha256sum | cut -d' ' -f1)"
read -r ready_hash ready_extras 2>/dev/null < "$stamp" || true
if [ -x .venv/bin/python ] && [ "${ready_hash:-}" = "$source_hash" ]; then
  case ",${ready_extras:-}," in *",$extras,"*) browser_for_tests; exit 0 ;; esac
  extras="$extras${ready_extras:+,$ready_extras}"
fi

python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
  done
fi
[ -n "$python" ] || { say "fastretina needs Python 3.11 or newer; install it, or name it: PYTHON=/path/to/python make setup" >&2; exit 1; }

if [ ! -x .venv/bin/python ]; then
  say "creating .venv with $("$python" --version)"
  if ! "$python" -m venv .venv >/dev/null 2>&1; then
    rm -rf .venv
    apt_install python3-venv || { say "python3 -m venv failed; install python3-venv and call again" >&2; exit 1; }
    "$python" -m venv .venv
  fi
fi
rm -f "$stamp"

say "installing fastretina[$extras] with torch and torchvision (2-4 minutes, about 6 GB)"
# One call for both, so that pip picks a torch and a torchvision that were built for each other.
.venv/bin/python -m pip install -q --disable-pip-version-check torch torchvision -e ".[$extras]"
.venv/bin/python -c 'import torchvision' || {
  say "torch and torchvision do not fit together: remove .venv and any local torch wheel that pip prefers" >&2; exit 1; }

ffcv_headers() { command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg && command -v c++ >/dev/null; }
if ! .venv/bin/python -c 'import ffcv' 2>/dev/null; then
  say "installing the ffcv extra (compiles for about a minute)"
  ffcv_headers || apt_install libopencv-dev libturbojpeg0-dev pkg-config g++ || true
  if ffcv_headers && .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[ffcv]"; then :; else
    say "going on without ffcv: its system packages (libopencv-dev libturbojpeg0-dev pkg-config g++) are not here and cannot be installed."
    say "fastretina itself does not need it; the tests and benchmarks against stock FFCV are skipped."
  fi
fi

# SPDL, a peer of the benchmarks, decodes by FFmpeg's libraries, which its package does not bring.
case ",$extras," in
  *,bench,*) command -v ffmpeg >/dev/null || apt_install ffmpeg || say "going on without FFmpeg: SPDL is left out of the benchmarks" ;;
esac

browser_for_tests
printf '%s %s\n' "$source_hash" "$extras" > "$stamp"
say "done: .venv/bin/python is ready"
