#!/usr/bin/env bash
# Everything that a GPU is needed for, in one call: the tests, then the measurements, each with a time limit of its own.
#
#   bash benchmarks/gpu_session.sh [STEP ...]        no STEP: check data tests device train18 loader train50
#
# Steps: check      which libraries and which GPU there are
#        data       28,100 samples at $DATA, unless they are there
#        tests      pytest -m gpu, in the files that have such tests
#        device     roofs, warp kernel, decoders, resident fill
#        loader     the loader alone, beside FFCV and DALI where they are installed
#        train18    ResNet18: synthetic, resident, decoded on the CPU, on the GPU     (train50: ResNet50)
#        compile18  ResNet18: the modes of torch.compile                              (compile50: ResNet50)
#        timeline   a profile of streaming with decoding on the CPU and on the GPU
#        run        fastretina.train for two epochs on $DATA
#
# A step that fails or runs out of time does not stop the others. Each leaves $OUT/STEP.json where it measures, all of them one
# $OUT/session.log, and $OUT/session.json says how each ended. The whole call ends within $LIMIT seconds: what did not get its time is
# named there. Call it again with the steps that are left, on the same machine, where data and compiled kernels still are.
#
# Environment: OUT (benchmarks/results), DATA (/tmp/fastretina-bench.beton), LIMIT (530), PYTHON (python3), and for a rehearsal
# without a GPU: DEVICE=cpu TRITON_INTERPRET=1, COUNT, SIZE (px), BATCH, ROUNDS.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT="${OUT:-benchmarks/results}" DATA="${DATA:-/tmp/fastretina-bench.beton}" LIMIT="${LIMIT:-530}" PYTHON="${PYTHON:-python3}"
DEVICE="${DEVICE:-cuda}" COUNT="${COUNT:-28100}" SIZE="${SIZE:-512}" BATCH="${BATCH:-256}" ROUNDS="${ROUNDS:-5}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
: >"$OUT/session.log"

ended=()   # JSON members, one a step

note() { ended+=("\"$1\": {\"exit\": $2, \"seconds\": $3}"); printf '%s: exit %s after %s s\n' "$1" "$2" "$3"; }

# step NAME SECONDS COMMAND...: run it for so long at most, and no longer than the call has left.
step() {
  local name="$1" most="$2" start=$SECONDS code log; shift 2
  local left=$((LIMIT - SECONDS))
  if [ "$left" -lt 10 ]; then note "$name" '"no time left"' 0; return; fi
  printf '\n== %s\n' "$name"
  log="$(mktemp)"
  timeout --kill-after=5 "$((most < left - 5 ? most : left - 5))" "$@" >"$log" 2>&1
  code=$?
  tail -n 40 "$log"
  { printf '\n== %s\n' "$name"; cat "$log"; } >>"$OUT/session.log"; rm "$log"
  note "$name" "$code" "$((SECONDS - start))"
}

throughput() {  # throughput NAME SECONDS FLAGS...
  local name="$1" most="$2"; shift 2
  step "$name" "$most" "$PYTHON" benchmarks/throughput.py --device "$DEVICE" --data "$DATA" --rounds "$ROUNDS" --json "$OUT/$name.json" "$@"
}

check() {
  "$PYTHON" - <<'PY'
import importlib, json, sys
sys.path.insert(0, "benchmarks")
needed = "numpy pandas PIL numba matplotlib simplejpeg cv2 torchmetrics tqdm tyro safetensors torch torchvision triton pytest psutil"
optional = "nvidia.nvimgcodec ffcv.loader nvidia.dali pynvml"
missing = {}
for name in (needed + " " + optional).split():
    try:
        importlib.import_module(name)
    except Exception as error:
        missing[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
print(json.dumps({"missing": missing}, indent=2))
from measure import hardware, versions
print(json.dumps({"versions": versions(), "hardware": hardware()}, indent=2))
sys.exit(any(name in missing for name in needed.split()))
PY
}
export -f check
export PYTHON

[ $# -gt 0 ] || set -- check data tests device train18 loader train50
for name in "$@"; do
  case "$name" in
    check) step check 60 bash -c check ;;
    data)
      if [ -e "$DATA" ]; then note data 0 0
      else step data 120 "$PYTHON" benchmarks/photographs.py --out "$DATA" --count "$COUNT" --size "$SIZE"; fi ;;
    tests)
      # Their files alone, because the others may need what a GPU machine lacks; and a warning of another version of a library is
      # no failure of the GPU path.
      mapfile -t files < <(grep -lE 'DEVICES|mark\.gpu' tests/test_*.py)
      step tests 180 "$PYTHON" -m pytest -m gpu -q -W default -p no:cacheprovider --durations=10 "${files[@]}" ;;
    device)
      step device 150 "$PYTHON" benchmarks/device.py --device "$DEVICE" --data "$DATA" --batch-size "$BATCH" --resolution "$SIZE" \
        --rounds "$ROUNDS" --json "$OUT/device.json" ;;
    loader) throughput loader 150 --only loader; throughput resident 60 --only resident ;;
    train18) throughput train18 200 --only train --arch resnet18 ;;
    train50) throughput train50 240 --only train --arch resnet50 ;;
    compile18) throughput compile18 400 --only compile --arch resnet18 ;;
    compile50) throughput compile50 400 --only compile --arch resnet50 ;;
    timeline)
      for decode in cpu gpu; do
        step "timeline-$decode" 90 "$PYTHON" benchmarks/timeline.py --device "$DEVICE" --data "$DATA" --decode "$decode" --out "$OUT/timeline-$decode"
      done ;;
    run)
      runs="$(mktemp -d)"  # its checkpoints are hundreds of megabytes; what it says is in the log
      step run 200 "$PYTHON" -m fastretina.train --train "$DATA" --test "$DATA" --amp --epochs 2 --batch-size 128 --resolution "$SIZE" \
        --device "$DEVICE" --out "$runs/run"
      [ ! -e "$runs/run/report.html" ] || cp "$runs/run/report.html" "$OUT/run.html"
      rm -rf "$runs" ;;
    *) printf 'gpu_session: unknown step %s; see the head of %s\n' "$name" "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done

(IFS=,; printf '{%s}\n' "${ended[*]}") | "$PYTHON" -m json.tool >"$OUT/session.json"
cat "$OUT/session.json"
