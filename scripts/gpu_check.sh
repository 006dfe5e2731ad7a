#!/usr/bin/env bash
# Everything that needs a GPU: builds this tree, runs ctest and pytest with all GPU tests, and
# compute-sanitizer over the C++ tests. Needs a CUDA GPU and toolkit, a Python with torch, pytest,
# nanobind and scikit-build-core, and no network.
#
#   scripts/gpu_check.sh <CUTLASS tree> [report]
#
# The report (default: standard output alone) is what belongs into benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
cutlass=$(realpath "${1:?usage: scripts/gpu_check.sh <CUTLASS tree> [report]}")
report=${2:-/dev/null}
build=build/gpu
python=${PYTHON:-python3}
# Whatever ends this also ends what it started.
trap 'pkill -P $$ || true' EXIT
trap 'exit 1' TERM INT

: >"$report"
say() { echo "$@" | tee -a "$report"; }
counts() { grep -E "tests passed|tests failed|passed|failed" "$1" | tail -1; }

say "# GPU check"
say "commit: ${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
say "GPU, driver: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
gpus=$(nvidia-smi --list-gpus | wc -l)
say "GPUs: $gpus"
say "nvcc: $(nvcc --version | sed -n 's/.*release \([^,]*\),.*/\1/p')"

architectures=${CMAKE_CUDA_ARCHITECTURES:+CMAKE_CUDA_ARCHITECTURES=$CMAKE_CUDA_ARCHITECTURES}
site=$PWD/$build/site
rm -rf "$site"
mkdir -p $build
# shellcheck disable=SC2086  # Options, or none.
$python -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" . \
  -C cmake.define.BINCONV_CUDA=ON -C cmake.define.BINCONV_CUTLASS_DIR="$cutlass" \
  ${architectures:+-C cmake.define.$architectures} &
wheel=$!
# shellcheck disable=SC2086
cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBINCONV_CUDA=ON \
  -DBINCONV_CUTLASS_DIR="$cutlass" ${architectures:+-D$architectures}
cmake --build $build
wait $wheel

# The sanitizers run beside the tests, on the last GPU. The tests ask for a device that does not
# exist; memcheck would call the refusal an error.
programs=("binconv_tests --device=cuda" "binconv_fuzz 0 40 cuda")
declare -A sanitizers
for tool in memcheck racecheck initcheck synccheck; do
  for i in 0 1; do
    options=()
    [ $tool = memcheck ] && options=(--report-api-errors no)
    # shellcheck disable=SC2086  # A program and its arguments.
    CUDA_VISIBLE_DEVICES=$((gpus - 1)) timeout "${SANITIZER_SECONDS:-1800}" \
      compute-sanitizer --tool $tool "${options[@]}" --error-exitcode 1 \
      $build/tests/cpp/${programs[$i]} >$build/$tool-$i.log 2>&1 &
    sanitizers[$tool-$i]=$!
  done
done

status=0  # A failing part does not stop the rest: one run tells everything.
ctest --test-dir $build -j "$(nproc)" --output-on-failure >$build/ctest.log || status=1
grep -A9999 "tests passed\|tests failed" $build/ctest.log
say "ctest: $(counts $build/ctest.log)"

workers=()
$python -c "import xdist" 2>/dev/null && workers=(-n "${PYTEST_WORKERS:-8}" --seed=$RANDOM)
PYTHONPATH="$site" $python -m pytest "${workers[@]}" >$build/pytest.log || status=1
grep -E "^(FAILED|ERROR)" $build/pytest.log || true
say "pytest: $(counts $build/pytest.log)"

for tool in memcheck racecheck initcheck synccheck; do
  for i in 0 1; do
    wait "${sanitizers[$tool-$i]}" || { status=1; tail -30 $build/$tool-$i.log; }
    found=$(grep "ERROR SUMMARY\|RACECHECK SUMMARY" $build/$tool-$i.log | tail -1)
    say "compute-sanitizer $tool, ${programs[$i]}: ${found:-did not end}"
  done
done
exit $status
