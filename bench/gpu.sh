#!/usr/bin/env bash
# Runs the GPU tests, then the loss benchmark at full size (this project's op and the floor, then the
# peers), on one GPU, within 10 minutes:
#
#     bench/gpu.sh [FOLDER]        JSON and pictures go to FOLDER (default bench/results)
#
# Each part has a time limit; a part that fails does not stop the others, and makes the exit status 1.
# torch and pytest must be installed, this checkout need not be. Environment variables change what is
# run, for a trial without a GPU:
#
#     DEVICE=cpu DTYPE=float32 TOKENS=64 VOCAB=512 HIDDEN=256 bench/gpu.sh /tmp/results
#
# On a CPU the GPU tests are left out. CONTENDERS sets the methods measured, in both kinds of runs.
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.."

out=${1:-$PWD/bench/results}
[[ $out == /* ]] || out=$here/$out
python=${PYTHON:-python3}  # always with -P: a folder here is called kernels, as a package is
device=${DEVICE:-cuda}

# This checkout as the package `redi`, even if another one is installed.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/redi"
for folder in engine kernels bench; do
    ln -s "$PWD/$folder" "$links/redi/$folder"
done
export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}

failed=0
# part SECONDS NAME COMMAND...: at most SECONDS, and never past the 10 minutes.
part() {
    local left=$((590 - SECONDS)) limit=$1 name=$2
    shift 2
    limit=$((limit < left ? limit : left))
    echo "== $name (at most $limit s)"
    if ((limit <= 0)) || ! timeout --kill-after=5 "$limit" "$@"; then
        echo "== $name: FAILED" >&2
        failed=1
    fi
}

if [[ $device == cuda ]]; then
    part 165 "GPU tests" "$python" -P -m pytest --import-mode=importlib -q -m gpu tests/gpu
fi
# loss SECONDS TURNS HIDDEN INPUTS LABEL WHO...: one run with TURNS seconds of turns; the rest is for
# compilation, the float64 check and the record.
loss() {
    part "$1" "loss, D $3, $4 inputs, $5" "$python" -P -m redi.bench.loss \
        --device "$device" --dtype "${DTYPE:-bfloat16}" --tokens "${TOKENS:-32768}" \
        --vocab "${VOCAB:-151936}" --hidden "$3" --inputs "$4" --label "$5" \
        --repeats "${REPEATS:-7}" --seconds "$2" --out "$out" \
        "${@:6}" ${CONTENDERS:+--contenders $CONTENDERS}
}

# This project's op first: a peer that hangs or breaks its process then loses no figure of it.
for hidden in ${HIDDEN:-1536 3584}; do
    for inputs in ${INPUTS:-trained random}; do
        loss 55 15 "$hidden" "$inputs" ours \
            --contenders floor redi-triton-exp redi-triton redi-torch eager
    done
done
for hidden in ${HIDDEN:-1536 3584}; do
    loss 100 25 "$hidden" trained peers --without redi-torch redi-filter eager eager-float32
done

echo "results are in $out:"
ls -1 "$out" || failed=1
exit $failed
