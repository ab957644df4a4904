#!/usr/bin/env bash
# What to run on a GPU that is lent for minutes, in calls of at most 4 minutes each:
#
#     bench/gpu.sh right [FOLDER]   does everything run, and is it right? then the loss and its floor
#     bench/gpu.sh speed [FOLDER]   whole steps of a 1.5B model, peers, tuning of the launches
#     bench/gpu.sh tests [FOLDER]   the GPU tests
#
# JSON and pictures go to FOLDER (default bench/results), each part's as soon as it has a result; a
# part has a time limit, one that fails or is stopped does not stop the others, and makes the exit
# status 1. torch, triton, numpy and transformers must be installed, this checkout need not be.
# WHEELS names a folder of wheels that are installed into a temporary folder without an index, for
# what training needs in addition and peers: packages that are not there are skipped, with a line.
#
# Other environment variables change what is run. A trial of each part without a GPU:
#
#     DEVICE=cpu bench/gpu.sh right /tmp/results
#
# Sizes: TOKENS, CHECK_TOKENS, VOCAB, HIDDEN (several), INPUTS, DTYPE; REPEATS; CONTENDERS of the loss.
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.."

what=${1:-}
out=${2:-$PWD/bench/results}
[[ $out == /* ]] || out=$here/$out
python=${PYTHON:-python3}  # always with -P: a folder here is called kernels, as a package is
device=${DEVICE:-cuda}

# On a CPU Triton's kernels are interpreted, and time is not what is tried: limits are 20 times longer.
train=() step=() patience=1
if [[ $device == cpu ]]; then
    export TRITON_INTERPRET=${TRITON_INTERPRET:-1}
    patience=20
    : "${TOKENS:=64}" "${CHECK_TOKENS:=48}" "${VOCAB:=512}" "${HIDDEN:=64}" "${REPEATS:=1}"
    attention=(--tokens 96 --timed_tokens 128)
    train=(--hidden 64 --head_dim 16 --layers 2 --vocab 64 --longest 60 --row_tokens 512)
    step=(--hidden 64 --layers 2 --vocabulary 512 --row_tokens 256 --median_tokens 40 --pairs 2)
else
    : "${TOKENS:=32768}" "${CHECK_TOKENS:=4096}" "${VOCAB:=151936}" "${HIDDEN:=1536 3584}"
    : "${REPEATS:=7}"
    attention=(--tokens 2048 --timed_tokens 32768)
    # Qwen2.5-1.5B's shape, about two rows of 32k tokens a step
    step=(--hidden 1536 --layers 28 --intermediate 8960 --heads 12 --key_heads 2 --checkpointing selective)
    step+=(--vocabulary 151936 --row_tokens 32768 --median_tokens 5000 --pairs 4)
fi

# This checkout as the package `redi`, even if another one is installed.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/redi"
for folder in engine kernels bench; do
    ln -s "$PWD/$folder" "$links/redi/$folder"
done
export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [[ -n ${WHEELS:-} ]]; then
    wheels=$(cd "$here" && cd "$WHEELS" && pwd) || exit 2
    "$python" -P -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$links/wheels" "$wheels"/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:$links/wheels  # what is installed comes first
fi

failed=0
# part SECONDS NAME COMMAND...: at most SECONDS, and never past the 4 minutes.
part() {
    local left=$((patience * 237 - SECONDS)) limit=$((patience * $1)) name=$2 began=$SECONDS
    shift 2
    limit=$((limit < left ? limit : left))
    echo "== $name (at most $limit s)"
    if ((limit <= 0)) || ! timeout --kill-after=3 "$limit" "$@"; then
        echo "== $name: FAILED" >&2
        failed=1
    fi
    echo "== $name: $((SECONDS - began)) s"
}
# run SECONDS NAME PROGRAM ARGUMENTS...: a program of this folder.
run() {
    part "$1" "$2" "$python" -P -m "redi.bench.$3" --device "$device" "${@:4}"
}
# loss SECONDS TURNS HIDDEN INPUTS LABEL WHO...: one run with TURNS seconds of turns; the rest is for
# compilation, the float64 check and the record.
loss() {
    run "$1" "loss, D $3, $4 inputs, $5" loss \
        --dtype "${DTYPE:-bfloat16}" --tokens "$TOKENS" --vocab "$VOCAB" --hidden "$3" \
        --inputs "$4" --label "$5" --repeats "$REPEATS" --seconds "$2" --out "$out" \
        "${@:6}" ${CONTENDERS:+--contenders $CONTENDERS}
}

case $what in
right)
    [[ $device == cuda ]] && nvidia-smi --format=csv,noheader \
        --query-gpu=name,driver_version,clocks.sm,temperature.gpu,power.draw
    run 60 kernels check_kernels --dtype "${DTYPE:-bfloat16}" --tokens "$CHECK_TOKENS" \
        --vocab "$VOCAB" --hidden $HIDDEN --inputs "${INPUTS:-trained}" --out "$out"
    run 25 attention check_attention "${attention[@]}" --out "$out"
    run 60 training check_train "${train[@]}" --out "$out"
    for hidden in $HIDDEN; do
        loss 45 12 "$hidden" "${INPUTS:-trained}" ours --contenders floor redi-triton-exp redi-triton
    done
    ;;
speed)
    run 70 "whole steps" step "${step[@]}" --ways packed --steps 3 --out "$out/step.json"
    mkdir -p "$out" && cp kernels/experimental/launches.json "$out/launches.json" || exit 1
    for hidden in $HIDDEN; do
        run 50 "tuning, D $hidden" tune --tokens "$TOKENS" --vocab "$VOCAB" --hidden "$hidden" \
            --inputs "${INPUTS:-trained}" --repeats "$REPEATS" --seconds 8 --try_seconds 25 \
            --table "$out/launches.json"
    done
    for hidden in $HIDDEN; do
        loss 32 8 "$hidden" "${INPUTS:-trained}" peers --without redi-torch redi-filter eager eager-float32
    done
    ;;
tests)
    part 230 "GPU tests" "$python" -P -m pytest --import-mode=importlib -q -m gpu tests/gpu
    ;;
*)
    sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

echo "results are in $out:"
ls -1 "$out" || failed=1
exit $failed
