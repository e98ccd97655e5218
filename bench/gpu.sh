#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, from a checkout with lvspec installed:
#   bash bench/gpu.sh                      all parts
#   bash bench/gpu.sh micro profile        some: correctness, micro, e2e, profile
# JSON, a log and a summary go to $OUT (default bench/results). A part that fails, or takes longer
# than its limit or than what is left of $SECONDS_IN_ALL (530), does not stop the others; the exit
# code says that there was one. DEVICE=cpu tries all of it without a GPU, at small sizes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,7s/^# \?//p' bench/gpu.sh; }
parts=("$@")
for part in "${parts[@]}"; do
    case $part in
        correctness | micro | e2e | profile) ;;
        -h | --help) usage; exit 0 ;;
        *) echo "expected correctness, micro, e2e or profile, got $part" >&2; usage >&2; exit 2 ;;
    esac
done
[[ ${#parts[@]} -gt 0 ]] || parts=(correctness micro e2e profile)

DEVICE=${DEVICE:-cuda}
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
deadline=${SECONDS_IN_ALL:-530}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/$DEVICE-gpu.log
: >"$log"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
failed=0
files=()

json() { echo "$OUT/$DEVICE-$1.json"; }

# step NAME SECONDS COMMAND...: what it prints goes to the log, its end is shown if it fails. The
# signal is Ctrl-C's, on which pytest still writes the benchmarks that it has.
step() {
    local name=$1 limit=$2 begin=$SECONDS code=124
    shift 2
    ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
    printf '\n#### %s: %s\n' "$name" "$*" >>"$log"
    local from
    from=$(wc -c <"$log")
    if ((limit > 5)); then
        timeout --signal=INT --kill-after=15 "$limit" "$@" >>"$log" 2>&1
        code=$?
    fi
    echo "$name: exit code $code after $((SECONDS - begin)) s"
    # 5 is pytest's for no tests of this kind.
    if ((code != 0 && code != 5)); then
        failed=1
        tail -c "+$((from + 1))" "$log" | tail -n 25 | cut -c1-200
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit \
    --format=csv 2>/dev/null || echo "nvidia-smi: not here"
"$PYTHON" -P -c 'import torch as t, triton as r; print("torch", t.__version__, "triton", r.__version__)'

for part in "${parts[@]}"; do
    rm -f "$(json "$part")"
    case $part in
        correctness)
            if [[ $DEVICE == cuda ]]; then
                if grep -rqs mark.gpu tests; then
                    step "tests of a gpu" 60 "$PYTHON" -P -m pytest -q -m gpu tests
                fi
                # Nearly all of their time is compilation.
                parallel=()
                ! "$PYTHON" -P -c 'import xdist' 2>/dev/null || parallel=(-n 8)
                step "tests of the operations" 150 env LVSPEC_BACKEND=triton \
                    LVSPEC_TEST_DEVICE=cuda PYTHONPATH=bench "$PYTHON" -P -m pytest -q \
                    -p default_device "${parallel[@]}" --maxfail=30 --tb=short \
                    tests/test_{verify_attention,logit_stats,accept,accept_sampled}.py \
                    tests/test_{commit_kv,visual_importance,expand_tree}.py
            fi
            step correctness 150 "$PYTHON" bench/correctness.py --device "$DEVICE" \
                --json "$(json correctness)"
            ;;
        micro)
            step micro 300 "$PYTHON" -P -m pytest -q --tb=short bench/bench_*.py \
                --bench-device "$DEVICE" --benchmark-json "$(json micro)"
            ;;
        e2e)
            clips=12
            [[ $DEVICE == cuda ]] || clips=1
            step e2e 90 "$PYTHON" bench/end_to_end.py --device "$DEVICE" --clips $clips \
                --json "$(json e2e)"
            ;;
        profile)
            options=(--context 16384)
            [[ $DEVICE == cuda ]] || options=(--model small --context 256)
            step profile 90 "$PYTHON" bench/profile_step.py --device "$DEVICE" "${options[@]}" \
                --json "$(json profile)"
            ;;
    esac
    [[ ! -s $(json "$part") ]] || files+=("$(json "$part")")
done

if [[ ${#files[@]} -gt 0 ]]; then
    "$PYTHON" bench/summary.py "${files[@]}" | tee "$OUT/$DEVICE-summary.txt"
fi
exit $failed
