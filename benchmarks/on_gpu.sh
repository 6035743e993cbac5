#!/usr/bin/env bash
# What is measured on a GPU, in order: the tests that need one, the solver, attaching, a whole build, where a short training's seconds go.
#
#   benchmarks/on_gpu.sh [tests|solver|attach|build|train ...]     all five by default
#
# Started in the root of the repository, with what the project imports on PYTHONPATH or installed. Logs and JSON go to ${OUT:-gpu-results},
# two files a section; the tables are printed again at the end. Nothing is fetched from anywhere.
#
#   DEVICE=cuda          where to compute; cpu tries the script out, with QUICK=1
#   QUICK=1              small shapes
#   TESTS="..."          what pytest is given besides: folders, options; by default all tests that take a device
#   SVDBANK_COMMIT=...   the commit, where there is no git
#   LIMIT_tests, LIMIT_solver, LIMIT_attach, LIMIT_build, LIMIT_train     seconds a section may take
set -uo pipefail

out=${OUT:-gpu-results}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
quick=()
[ -n "${QUICK:-}" ] && quick=(--quick)
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

sections=("$@")
[ ${#sections[@]} -eq 0 ] && sections=(tests solver attach build train)
for section in "${sections[@]}"; do
    case $section in
        tests | solver | attach | build | train) ;;
        *)
            echo "no section is called $section; there are tests, solver, attach, build, train" >&2
            exit 2
            ;;
    esac
done
mkdir -p "$out"

# limited SECTION DEFAULT_SECONDS COMMAND...: its output to the terminal and to SECTION.log, stopped after its limit.
limited() {
    local name=$1 limit=LIMIT_$1 seconds=$2
    shift 2
    timeout --kill-after=15 "${!limit:-$seconds}" "$@" 2>&1 | tee "$out/$name.log"
    return "${PIPESTATUS[0]}"
}

run() {
    case $1 in
        # shellcheck disable=SC2086 # TESTS is several words on purpose
        tests)
            limited tests 300 "$python" -m pytest -q -p no:cacheprovider -m "not soak" --continue-on-collection-errors \
                --device "$device" -k "$device" ${TESTS:-tests}
            ;;
        solver) limited solver 300 "$python" -m benchmarks.solver --device "$device" --json "$out/solver.json" "${quick[@]}" ;;
        attach) limited attach 240 "$python" -m benchmarks.attach --device "$device" --json "$out/attach.json" "${quick[@]}" ;;
        build) limited build 240 "$python" -m benchmarks.build --device "$device" --json "$out/build.json" "${quick[@]}" ;;
        train) limited train 240 "$python" -m benchmarks.stages --device "$device" --json "$out/train.json" "${quick[@]}" ;;
    esac
}

declare -A code took
failed=0
for section in "${sections[@]}"; do
    printf '\n== %s\n\n' "$section"
    begun=$SECONDS
    run "$section"
    code[$section]=$?
    took[$section]=$((SECONDS - begun))
    [ "${code[$section]}" -eq 0 ] || failed=1
done

printf '\n== summary\n'
for section in "${sections[@]}"; do
    case ${code[$section]} in
        0) verdict=done ;;
        124 | 137) verdict="stopped: out of time" ;;
        *) verdict="failed (exit code ${code[$section]})" ;;
    esac
    printf '\n%s: %s, %s s\n' "$section" "$verdict" "${took[$section]}"
    if [ "$section" = tests ]; then
        tail -n 15 "$out/tests.log"
    else
        grep -E '^\| ' "$out/$section.log"
    fi
done
exit $failed
