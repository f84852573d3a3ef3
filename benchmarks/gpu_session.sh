#!/usr/bin/env bash
# Everything that a GPU is needed for, in three calls of less than ten minutes, each for a machine of its own.
#
#   bash benchmarks/gpu_session.sh 1 | 2 | 3 | STEP ...
#
#   1: data check headline18 headline50 device tests
#   2: data check fill run training timeline stages loader
#   3: data check sweep18 sweep50 shares resident
#
# Steps: data        28,100 samples at $DATA, unless they are there: made beside the next steps, which wait for them
#        check       which libraries and which GPU there are; where one is missing the call ends here, with 1
#        headline18  ResNet18 on clones, resident, decoded on the CPU, on the GPU     (headline50: ResNet50, two batch sizes)
#        sweep18     ResNet18 on clones: modes of torch.compile, batch sizes, memory formats     (sweep50: ResNet50)
#        device      roofs, warp kernel, decoders     (fill: resident memory; shares: the decoders' shares of the work)
#        tests       pytest -m gpu, one process for each file that has such tests but test_gpu_training, which takes longest
#        training    that one
#        loader      the loader alone, beside FFCV and DALI where they are installed     (resident: from resident memory)
#        stages      the CPU alone: what an image costs, and the loader beside as many bare threads that decode
#        timeline    a profile of fastretina.train, streaming, with decoding on the CPU and on the GPU
#        run         fastretina.train for two epochs on $DATA
#
# A step that fails or runs out of time does not stop the others. Each leaves $OUT/STEP.json where it measures, all of them one
# $OUT/session.log, to which a second call appends, and $OUT/session.json says how each ended, from the moment that it does. The whole
# call ends within $LIMIT seconds: what did not get its time is named there. At most 8 files are left in $OUT.
#
# Environment: OUT (benchmarks/results), DATA (/tmp/fastretina-bench.beton), LIMIT (560), PYTHON (python3), CACHE (the caches.tar.xz
# that an earlier call left: what torch.compile and Triton have compiled), ROUNDS, and for a rehearsal without a GPU: DEVICE=cpu
# TRITON_INTERPRET=1, COUNT, SIZE (px), BATCH, STEPS.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT="${OUT:-benchmarks/results}" DATA="${DATA:-/tmp/fastretina-bench.beton}" LIMIT="${LIMIT:-560}" PYTHON="${PYTHON:-python3}"
DEVICE="${DEVICE:-cuda}" COUNT="${COUNT:-28100}" SIZE="${SIZE:-512}" BATCH="${BATCH:-}" STEPS="${STEPS:-0}" ROUNDS="${ROUNDS:-}"
caches="${TMPDIR:-/tmp}/fastretina-caches"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$caches/inductor" TRITON_CACHE_DIR="$caches/triton"
export PYTHON DEVICE

case "$*" in
  1) set -- data check headline18 headline50 device tests ;;
  2) set -- data check fill run training timeline stages loader ;;
  3) set -- data check sweep18 sweep50 shares resident ;;
esac
for name in "$@"; do
  case "$name" in
    check|data|headline18|headline50|sweep18|sweep50|device|fill|shares|tests|training|stages|loader|resident|timeline|run) ;;
    *) printf 'gpu_session: unknown step %s; see the head of %s\n' "$name" "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done
[ $# -gt 0 ] || { printf 'gpu_session: 1, 2, 3 or steps; see the head of %s\n' "${BASH_SOURCE[0]}" >&2; exit 2; }

mkdir -p "$OUT" "$TORCHINDUCTOR_CACHE_DIR" "$TRITON_CACHE_DIR"
exec 3>&1 4>&2
exec > >(tee -a "$OUT/session.log") 2>&1  # what has been said is in the log, whatever ends the session
logger=$!
maker=
# A process that a step has left behind may hold the log open: it is not waited for for ever.
finish() {
  [ -z "$maker" ] || kill "$maker" 2>/dev/null
  exec >&3 2>&4
  for _ in $(seq 30); do kill -0 "$logger" 2>/dev/null || return 0; sleep 0.1; done
  kill "$logger"
}
trap finish EXIT
printf '\n==== %s: %s, at most %s s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" "$LIMIT"
if [ -n "${CACHE:-}" ]; then tar -C "$caches" -xf "$CACHE" && printf 'unpacked %s\n' "$CACHE"; fi

declare -A ended
order=()

note() {  # note NAME EXIT SECONDS: session.json says so from now on
  [ -n "${ended[$1]:-}" ] || order+=("$1")
  ended[$1]="{\"exit\": $2, \"seconds\": $3}"
  local member comma='' text='{'
  for member in "${order[@]}"; do text+="$comma"$'\n'"  \"$member\": ${ended[$member]}"; comma=,; done
  printf '%s\n}\n' "$text" >"$OUT/.session.json.tmp" && mv "$OUT/.session.json.tmp" "$OUT/session.json"
  [ "$2" = '"under way"' ] || printf '%s: exit %s after %s s\n' "$1" "$2" "$3"
}

allowed() {  # allowed SECONDS: no more than that, and no more than the call has left
  local left=$((LIMIT - SECONDS - 5))
  echo "$(($1 < left ? $1 : left))"
}

code=0
step() {  # step NAME SECONDS COMMAND...: run it for so long at most; its exit in $code
  local name="$1" most start=$SECONDS
  most="$(allowed "$2")"; shift 2
  if [ "$most" -lt 5 ]; then code=124; note "$name" '"no time left"' 0; return; fi
  note "$name" '"under way"' 0
  printf '\n== %s\n' "$name"
  timeout --kill-after=5 "$most" "$@"
  code=$?
  note "$name" "$code" "$((SECONDS - start))"
}

made() {  # wait until the data are there, or never will be
  [ -n "$maker" ] || return 0
  local code
  printf '\n== data\n'
  wait "$maker"; code=$?; maker=
  note data "$code" "$((SECONDS - making))"
}

sizes() {  # batch sizes; in a rehearsal multiples of its own
  local size number=0
  for size in "$@"; do number=$((number + 1)); [ -z "$BATCH" ] || size=$((number * BATCH)); echo "$size"; done
}

pack() {  # what has been compiled by now, for a later call
  local packed bytes
  packed="$(mktemp)"
  XZ_OPT='-4 -T0' tar -C "$caches" -cJf "$packed" . || [ $? = 1 ] || { printf 'caches: cannot be packed\n'; return; }  # 1: a file changed meanwhile
  bytes="$(stat -c %s "$packed")"
  if [ "$bytes" -le $((16 << 20)) ]; then cp "$packed" "$OUT/.caches.tmp" && mv "$OUT/.caches.tmp" "$OUT/caches.tar.xz"
  else printf 'caches: %s bytes packed, more than 16 MiB: left out\n' "$bytes"; fi
  rm -f "$packed"
}

headline() {  # headline NAME SECONDS FLAGS...: again, at most twice, where a side hung or took the process with it
  local name="$1" until=$((SECONDS + $2)) most; shift 2
  local flags=(--device "$DEVICE" --data "$DATA" --resolution "$SIZE" --steps "$STEPS" --json "$OUT/$name.json" "$@")
  [ -z "$ROUNDS" ] || flags+=(--rounds "$ROUNDS")
  [ "$DEVICE" = cuda ] || flags+=(--decoder nvimgcodec)
  for _ in 1 2 3; do
    most="$(allowed $((until - SECONDS)))"
    step "$name" "$most" "$PYTHON" benchmarks/headline.py --budget "$((most - 8))" "${flags[@]}"
    [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ $((until - SECONDS)) -gt 30 ] || break
  done
  pack
}

device() {  # device NAME SECONDS PIECE...
  local name="$1" most="$2"; shift 2
  step "$name" "$most" "$PYTHON" benchmarks/device.py --device "$DEVICE" --data "$DATA" --batch-size "${BATCH:-256}" \
    --resolution "$SIZE" --rounds "${ROUNDS:-5}" --json "$OUT/$name.json" --only "$@"
}

gpu_tests() {  # gpu_tests NAME SECONDS FILE: a warning of another version of a library is no failure of the GPU path
  # 5: it has no test to run, where a library is missing that it is about. -v: a file that is killed says what had passed.
  step "$1" "$2" bash -c '"$@" || [ $? = 5 ]' pytest "$PYTHON" -m pytest -m gpu -v -W default -p no:cacheprovider --durations=5 "$3"
}

throughput() {  # throughput NAME SECONDS
  step "$1" "$2" "$PYTHON" benchmarks/throughput.py --device "$DEVICE" --data "$DATA" --rounds "${ROUNDS:-5}" --json "$OUT/$1.json" \
    --only "$1" --patience 60
}

check() {
  command -v nvidia-smi >/dev/null && nvidia-smi
  "$PYTHON" - <<'PY'
import importlib, importlib.util, json, os, sys
sys.path.insert(0, "benchmarks")
needed = "numpy torch torchvision triton numba pandas PIL matplotlib simplejpeg cv2 tqdm tyro safetensors pytest psutil"
missing = {}
for name in needed.split():
    try:
        importlib.import_module(name)
    except Exception as error:
        missing[name] = f"{type(error).__name__}: {error}"
absent = [name for name in ("nvidia.nvimgcodec", "ffcv", "nvidia.dali", "pynvml")
          if not (importlib.util.find_spec(name.split(".")[0]) and importlib.util.find_spec(name))]
print(json.dumps({"missing": missing, "optional and absent": absent}, indent=2))
if missing:
    sys.exit(1)
from measure import hardware, versions
print(json.dumps({"versions": versions(), "hardware": hardware()}, indent=2))
import torch
if os.environ["DEVICE"] == "cuda" and not torch.cuda.is_available():
    sys.exit("no CUDA device")
PY
}
export -f check

modes=(default off reduce-overhead max-autotune-no-cudagraphs)
[ "$DEVICE" = cuda ] || modes=(off)
for name in "$@"; do
  case "$name" in
    device|fill|shares|tests|training|stages|loader|resident|timeline|run) made ;;  # headline.py waits by itself
  esac
  case "$name" in
    check)
      step check 40 bash -c check
      # Out of time is not missing: a cold disk may take as long to import torch.
      if [ "$code" -ne 0 ] && [ "$code" -ne 124 ]; then
        [ -z "$maker" ] || kill "$maker" 2>/dev/null
        made
        exit 1
      fi ;;
    data)
      making=$SECONDS
      if [ -e "$DATA" ]; then note data 0 0; continue; fi
      note data '"under way"' 0
      timeout 150 nice -n 19 "$PYTHON" benchmarks/photographs.py --out "$DATA" --count "$COUNT" --size "$SIZE" & maker=$! ;;
    # A compilation that takes longer than that gives its place to eager steps, for which there is then still time.
    headline18) headline headline18 165 --arch resnet18 --compile-deadline 70 --modes "${modes[0]}" --batch-size $(sizes 128) ;;
    headline50) headline headline50 200 --arch resnet50 --compile-deadline 90 --modes "${modes[0]}" --batch-size $(sizes 64 128) ;;
    sweep18)
      headline sweep18 215 --arch resnet18 --compile-deadline 60 --modes "${modes[@]}" --batch-size $(sizes 128 64 256) \
        --memory-format channels_last contiguous --sides clone ;;
    sweep50)
      headline sweep50 215 --arch resnet50 --compile-deadline 60 --modes "${modes[@]}" --batch-size $(sizes 64 128) \
        --memory-format channels_last contiguous --sides clone ;;
    device) device device 60 roof kernel decode ;;
    fill) device fill 90 fill ;;
    shares) device shares 60 shares ;;
    tests)
      # Their files alone, because the others may need what a GPU machine lacks, and the nearest to the device first.
      mapfile -t files < <(grep -slE '\bDEVICES|mark\.gpu' tests/loading/test_{augment_gpu,device_stage,decode_gpu}.py tests/*/test_*.py | awk '!seen[$0]++')
      for file in "${files[@]}"; do
        case "$file" in *gpu_training*) ;; *) gpu_tests "$(basename "$file" .py)" 120 "$file" ;; esac
      done ;;
    training) gpu_tests test_gpu_training 150 tests/training/test_gpu_training.py ;;
    stages) step stages 75 "$PYTHON" benchmarks/stages.py --data "$DATA" --rounds "${ROUNDS:-3}" --json "$OUT/stages.json" ;;
    loader) throughput loader 260 ;;
    resident) throughput resident 80 ;;
    timeline)
      runs="$(mktemp -d)"  # its table is in the log
      for decode in cpu $([ "$DEVICE" = cpu ] || echo gpu); do
        step "timeline-$decode" 40 "$PYTHON" -m fastretina.train --train "$DATA" --test "$DATA" --amp --batch-size "$(sizes 128)" \
          --resolution "$SIZE" --device "$DEVICE" --decode "$decode" --resident off $([ "$DEVICE" = cpu ] || echo --compile default) \
          --profile 5 --stop-after-steps 16 --val-fraction 0 --out "$runs/timeline-$decode"
        [ ! -e "$runs/timeline-$decode/profile.json.gz" ] ||
          cp "$runs/timeline-$decode/profile.json.gz" "$OUT/timeline-$decode.json.gz"
      done
      rm -rf "$runs" ;;
    run)
      runs="$(mktemp -d)"  # its checkpoints are hundreds of megabytes; what it says is in the log
      step run 120 "$PYTHON" -m fastretina.train --train "$DATA" --test "$DATA" --amp --epochs 2 --batch-size "$(sizes 128)" \
        --resolution "$SIZE" --device "$DEVICE" --val-fraction 0 --out "$runs/run"
      [ ! -e "$runs/run/report.html" ] || cp "$runs/run/report.html" "$OUT/run.html"
      rm -rf "$runs" ;;
  esac
done
made
cat "$OUT/session.json"
