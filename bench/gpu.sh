#!/usr/bin/env bash
# Everything that needs a GPU, each part in under nine minutes, from a checkout where torch, triton,
# transformers, rich, pytest and pytest-benchmark are installed; lvspec need not be. Without av the
# embedded pair, which is shown files, is left out.
#   bash bench/gpu.sh                  all parts, together in under nine minutes
#   bash bench/gpu.sh e2e              one, with all of the time: correctness, micro, e2e, profile,
#                                      sanitize
#   PAIRS="qwen-32b-7b" LABEL=32b bash bench/gpu.sh e2e      one pair, in a file of its own
#   bash bench/gpu.sh first            the most valuable evidence within 240 seconds
#   bash bench/gpu.sh second           and what comes next within 270: bench/gpu_calls.sh has the steps
# JSON, a log and a summary go to $OUT (default bench/results); `bench/report.py --write` makes the
# tables of bench/README.md of them. A part that fails, or takes longer than its limit or than what
# is left of $SECONDS_IN_ALL (520), does not stop the others; the exit code says that there was one.
# DEVICE=cpu tries all of it without a GPU, at small sizes. OPTIONS are more words for e2e.py, such as
# "--set fuse=none", "--context 16384" or "--compile". e2e keeps what it has measured, method by
# method, and goes on there when it is called again; remove its JSON to begin anew.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PARTS=(correctness micro e2e profile sanitize)
usage() { sed -n '2,16s/^# \?//p' bench/gpu.sh; }
parts=("$@")
for part in "${parts[@]}"; do
    case $part in
        correctness | micro | e2e | profile | sanitize) ;;
        first | second)
            [[ ${#parts[@]} -eq 1 ]] || { echo "$part: expected alone" >&2; exit 2; }
            ;;
        -h | --help) usage; exit 0 ;;
        *) echo "expected one of ${PARTS[*]} first second, got $part" >&2; usage >&2; exit 2 ;;
    esac
done
[[ ${#parts[@]} -gt 0 ]] || parts=("${PARTS[@]}")

DEVICE=${DEVICE:-cuda}
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
LABEL=${LABEL:+-$LABEL}
case ${parts[0]} in
    first) in_all=240 LABEL=${LABEL:--first} ;;
    second) in_all=270 LABEL=${LABEL:--second} ;;
    *) in_all=520 ;;
esac
deadline=${SECONDS_IN_ALL:-$in_all}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/$DEVICE-gpu$LABEL.log
[[ ${parts[0]} == first || ${parts[0]} == second ]] || : >"$log" # a call goes on with its own
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
failed=0
files=()

json() { echo "$OUT/$DEVICE-$1$LABEL.json"; }

# A part alone has all of the time; of several each has what it needs.
limit() { if ((${#parts[@]} == 1)); then echo 600; else echo "$1"; fi; }

# step NAME SECONDS COMMAND...: what it prints goes to the log, its end is shown if it fails. The
# signal is Ctrl-C's, on which pytest still writes the benchmarks that it has.
step() {
    local name=$1 limit=$2 begin=$SECONDS code=124
    [[ $DEVICE == cuda ]] || limit=$((5 * limit)) # a rehearsal may share its core
    shift 2
    ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
    printf '\n#### %s: %s\n' "$name" "$*" >>"$log"
    local from
    from=$(wc -c <"$log")
    if ((limit > 5)); then
        timeout --signal=INT --kill-after=15 "$limit" "$@" >>"$log" 2>&1
        code=$?
    fi
    echo "$name: exit code $code after $((SECONDS - begin)) s" | tee -a "$log"
    # 5 is pytest's for no tests of this kind.
    if ((code != 0 && code != 5)); then
        failed=1
        tail -c "+$((from + 1))" "$log" | tail -n 25 | cut -c1-200
        return 1
    fi
}

# Where compute-sanitizer is: CUDA's toolkit has it, its Python packages may.
sanitizer() {
    local found packages name=compute-sanitizer
    packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for found in "$(command -v $name)" "${CUDA_HOME:-/usr/local/cuda}/bin/$name" \
        /usr/local/cuda*/bin/$name "$packages"/nvidia/*/bin/$name; do
        if [[ -x $found ]]; then
            echo "$found"
            return
        fi
    done
}

# An install builds the C++ for most of a minute. A folder of links is found as well, and what was
# compiled elsewhere (lvspec/_C.abi3.so) is used where it lies.
links=
trap 'rm -rf "$links"' EXIT
if ! (cd / && "$PYTHON" -c 'import importlib.util as u; exit(u.find_spec("lvspec") is None)'); then
    links=$(mktemp -d)
    mkdir "$links/lvspec"
    ln -s "$PWD"/lvspec/* "$PWD/kernels" "$links/lvspec"
    export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}
    echo "lvspec: not installed, its sources are used"
fi

# By its path: as a module it would have the root, and kernels/ in it, on its path.
pytest=$("$PYTHON" -c 'import pytest; print(pytest.__path__[0])')/__main__.py

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit \
    --format=csv 2>/dev/null || echo "nvidia-smi: not here"
"$PYTHON" -c 'import torch as t, triton as r; print("torch", t.__version__, "triton", r.__version__)'

case ${parts[0]} in first | second) source bench/gpu_calls.sh "${parts[0]}" ;; esac

for part in "${parts[@]}"; do
    [[ $part == e2e ]] || rm -f "$(json "$part")" # e2e.py goes on with its own
    case $part in
        first | second) continue ;;
        correctness)
            if [[ $DEVICE == cuda ]]; then
                # Nearly all of their time is compilation.
                parallel=()
                ! "$PYTHON" -c 'import xdist' 2>/dev/null || parallel=(-n 8)
                step "tests of a gpu" "$(limit 90)" "$PYTHON" "$pytest" -q "${parallel[@]}" \
                    -m gpu tests
                step "tests of the operations" "$(limit 90)" env LVSPEC_BACKEND=triton \
                    LVSPEC_TEST_DEVICE=cuda "PYTHONPATH=bench${PYTHONPATH:+:$PYTHONPATH}" \
                    "$PYTHON" "$pytest" -q \
                    -p ops.default_device "${parallel[@]}" --maxfail=30 --tb=short tests/ops
            fi
            step correctness "$(limit 90)" "$PYTHON" bench/correctness.py --device "$DEVICE" \
                --json "$(json correctness)"
            ;;
        micro)
            # What matters most comes first, in case time is over.
            micro=()
            for name in verify_attention logit_stats accept commit_kv gate; do
                micro+=("bench/ops/bench_$name.py")
            done
            for file in bench/ops/bench_*.py; do
                [[ " ${micro[*]} " == *" $file "* ]] || micro+=("$file")
            done
            step micro "$(limit 150)" "$PYTHON" "$pytest" -q --tb=short "${micro[@]}" \
                --bench-device "$DEVICE" --benchmark-json "$(json micro)"
            ;;
        e2e)
            # What is begun last may go on for a while.
            seconds=$(limit 150)
            ((seconds <= deadline - SECONDS)) || seconds=$((deadline - SECONDS))
            options=(--clips 12 ${PAIRS:+--pair $PAIRS})
            [[ $DEVICE == cuda ]] \
                || options=(--clips 1 --pair ${PAIRS:-tiny} --context 300 --iterations 5)
            step e2e "$seconds" "$PYTHON" bench/e2e.py --device "$DEVICE" \
                --budget $((seconds * 4 / 5)) "${options[@]}" ${OPTIONS:-} --json "$(json e2e)"
            ;;
        profile)
            pair=${PAIRS:-}
            options=(--context 16384 ${pair:+--pair ${pair%% *}})
            [[ $DEVICE == cuda ]] || options=(--pair tiny --context 300)
            step profile "$(limit 90)" "$PYTHON" bench/profile_step.py --device "$DEVICE" \
                "${options[@]}" --json "$(json profile)"
            ;;
        sanitize)
            tool=$(sanitizer)
            if [[ $DEVICE != cuda || -z $tool ]]; then
                echo "sanitize: compute-sanitizer is not here"
                continue
            fi
            for check in memcheck racecheck; do
                step "$check" $(($(limit 200) / 2)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                    "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" bench/correctness.py \
                    --device cuda --set small --processes 1
            done
            ;;
    esac
    [[ ! -s $(json "$part") ]] || files+=("$(json "$part")")
done

if [[ ${#files[@]} -gt 0 ]]; then
    "$PYTHON" bench/report.py "${files[@]}" | tee "$OUT/$DEVICE-summary$LABEL.txt"
fi
exit $failed
