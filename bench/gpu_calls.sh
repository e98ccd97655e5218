# The steps of `gpu.sh first` and `gpu.sh second`, which source this: NAME, the seconds it may take
# on a GPU, and its command; behind it the seconds of its rehearsal (DEVICE=cpu, small sizes) with
# Python 3.12, torch 2.11, triton 3.6 and transformers 5.17, and with Python 3.11, torch 2.13,
# triton 3.9 and transformers 5.24: one thread of a two-core Xeon that others shared. The calls took
# 51 and 78 seconds, and 52 and 128.
# A step that has ended well is not run again by the same call in the same $OUT, and e2e.py goes on
# method by method. Triton's cache is begun with $CACHE (default triton-cache), as precompile.py
# makes it, if that fits, and is in $OUT as triton-cache.tar.gz afterwards: eight files in all.

call=$1
done_steps=$OUT/$DEVICE-$call.done
touch "$done_steps"
context=16384
cpu=()
if [[ $DEVICE != cuda ]]; then
    context=300
    cpu=(--iterations 3)
fi

# pair NAME: on a CPU a tiny one stands for it.
pair() { if [[ $DEVICE == cuda ]]; then echo "$1"; else echo tiny; fi; }

# do_step NAME SECONDS COMMAND...: unless it has been done.
do_step() {
    if grep -qx "$1" "$done_steps"; then
        echo "$1: done before"
    else
        step "$@" && echo "$1" >>"$done_steps"
        sweep
    fi
}

# What a process that was killed was writing is no result.
sweep() { rm -f "$OUT"/.*.part; }

py() { do_step "$1" "$2" "$PYTHON" "bench/$3" --device "$DEVICE" "${@:4}"; }

begin_cache() {
    export TRITON_CACHE_DIR
    TRITON_CACHE_DIR=$(mktemp -d)
    local from=${CACHE:-triton-cache}
    [[ -d $from ]] || { echo "cache: none in $from"; return; }
    cp -r "$from/." "$TRITON_CACHE_DIR"
    "$PYTHON" bench/precompile.py --use --cache "$TRITON_CACHE_DIR" || failed=1
}

end_cache() {
    tar czf "$OUT/triton-cache.tar.gz" -C "$TRITON_CACHE_DIR" . && rm -rf "$TRITON_CACHE_DIR"
}

tests() { # NAME SECONDS WORDS...
    local parallel=()
    ! "$PYTHON" -c 'import xdist' 2>/dev/null || [[ $DEVICE != cuda ]] || parallel=(-n 8)
    local backend=()
    [[ $DEVICE != cuda ]] || backend=(LVSPEC_BACKEND=triton)
    do_step "$1" "$2" env "PYTHONPATH=bench${PYTHONPATH:+:$PYTHONPATH}" "${backend[@]}" \
        LVSPEC_TEST_DEVICE="$DEVICE" "$PYTHON" "$pytest" -q --tb=short "${parallel[@]}" "${@:3}"
}

micro() { # NAME SECONDS FILES AND WORDS...
    do_step "$1" "$2" "$PYTHON" "$pytest" -q --tb=short "${@:3}" --bench-device "$DEVICE" \
        --benchmark-json "$(json micro)"
}

first() {
    py facts 20 facts.py --json "$(json facts)" # 4, 5
    py correctness 45 correctness.py --set small --json "$(json correctness)" \
        --operations verify_attention logit_stats accept commit_kv # 3, 3
    tests chains 55 -m gpu tests/engine/test_gpu.py -k chain # 7, 12: found, and skipped
    py "e2e, 7B <- 3B" 80 e2e.py pairs --pair "$(pair qwen-7b-3b)" --context $context --batch 1 \
        --no-peers --budget 60 "${cpu[@]}" --json "$(json e2e)" # 9, 9
    py "profile, 7B <- 3B" 60 profile_step.py --pair "$(pair qwen-7b-3b)" --context $context \
        --json "$(json profile)" # 10, 8
    micro verify_attention 40 bench/ops/bench_verify_attention.py --no-peers # 5, 6
}

second() {
    py "e2e, 32B <- 3B" 80 e2e.py pairs --pair "$(pair qwen-32b-3b)" --context $context --batch 1 \
        --no-peers --budget 65 "${cpu[@]}" --json "$(json e2e)" # 8, 20
    py "e2e, 7B <- 3B, peers" 80 e2e.py pairs --pair "$(pair qwen-7b-3b)" --context $context \
        --batch 1 --budget 60 "${cpu[@]}" --json "$(json e2e)" # 7, 15
    tests operations 60 -p ops.default_device --maxfail=30 tests/ops/test_commit.py \
        tests/ops/test_verify_attention.py tests/ops/test_accept.py \
        tests/ops/test_model_parts.py # 27, 42
    micro "verify_attention, scaled_linear" 50 bench/ops/bench_verify_attention.py \
        bench/ops/bench_scaled_linear.py # 5, 9
    py "profile, 32B <- 3B" 60 profile_step.py --pair "$(pair qwen-32b-3b)" --context $context \
        --json "$(json profile)" # 6, 15
    py "profile, 7B <- 3B, launched early" 45 profile_step.py --pair "$(pair qwen-7b-3b)" \
        --context $context --early --json "$(json profile-early)" # 8, 16
}

sweep
begin_cache
trap 'end_cache; rm -rf "$links"' EXIT
"$call"
for found in "$OUT/$DEVICE"-*"$LABEL.json"; do [[ ! -s $found ]] || files+=("$found"); done
"$PYTHON" bench/report.py "${files[@]}" | tee -a "$log"
exit $failed
