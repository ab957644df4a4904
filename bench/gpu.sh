#!/usr/bin/env bash
# Runs the GPU tests, then the loss benchmark at full size, on one card, within 10 minutes:
#
#     bench/gpu.sh [FOLDER]        JSON and pictures go to FOLDER (default bench/results)
#
# Each part has a time limit of its own; a part that fails does not stop the others, and makes the
# exit status 1. The checkout need not be installed; torch and pytest must be. Variables change what
# is run, so that it can be tried without a card:
#
#     DEVICE=cpu DTYPE=float32 TOKENS=64 VOCAB=512 HIDDEN=256 bench/gpu.sh /tmp/results
#
# On a CPU the GPU tests are left out. CONTENDERS limits who is measured (default: all).
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.."

out=${1:-$PWD/bench/results}
[[ $out == /* ]] || out=$here/$out
python=${PYTHON:-python3}  # always with -P: a folder here is called kernels, as a package is
device=${DEVICE:-cuda}
read -ra contenders <<<"${CONTENDERS:-}"

# This checkout as the package `redi`, whatever else is installed.
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
    part 170 "GPU tests" "$python" -P -m pytest --import-mode=importlib -q -m gpu tests/gpu
fi
# --seconds: the turns end in time for the float64 check and the record.
for hidden in ${HIDDEN:-1536 3584}; do
    for inputs in ${INPUTS:-trained random}; do
        part 125 "loss, D $hidden, $inputs inputs" "$python" -P -m redi.bench.loss \
            --device "$device" --dtype "${DTYPE:-bfloat16}" --tokens "${TOKENS:-32768}" \
            --vocab "${VOCAB:-151936}" --hidden "$hidden" --inputs "$inputs" \
            --repeats "${REPEATS:-7}" --seconds 30 --out "$out" \
            ${contenders[0]+--contenders "${contenders[@]}"}
    done
done

echo "results are in $out:"
ls -1 "$out" || failed=1
exit $failed
