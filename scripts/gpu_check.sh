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
sanitizers=  # A process group of their own.
trap 'pkill -P $$ || true; [ -z "$sanitizers" ] || kill -- -"$sanitizers" 2>/dev/null || true' EXIT
trap 'exit 1' TERM INT

: >"$report"
say() { echo "$@" | tee -a "$report"; }
counts() { grep -E "tests passed|tests failed|passed|failed" "$1" | tail -1; }

say "# GPU check"
say "commit: ${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
say "GPU, driver: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
gpus=$(nvidia-smi --list-gpus | grep -c "^GPU")
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

# The sanitizers run beside the tests, on the last GPU, over the suites of the C++ tests one by one.
# The tests ask for a device that does not exist; memcheck would call the refusal an error. Some
# suites call nothing of CUDA.
tools=(racecheck memcheck initcheck synccheck)
mapfile -t suites < <($build/tests/cpp/binconv_tests --list | sed -n 's/\..*//p' | sort -u)
[ ${#suites[@]} -gt 0 ]
sanitize() {
  local program="binconv_tests --device=cuda $2" options=(--require-cuda-init no)
  [ "$1" = memcheck ] && options+=(--report-api-errors no)
  [ "$2" = fuzz ] && program="binconv_fuzz 0 40 cuda"
  # shellcheck disable=SC2086  # A program and its arguments.
  timeout --foreground "${SANITIZER_SECONDS:-1800}" compute-sanitizer --tool "$1" "${options[@]}" \
    --error-exitcode 1 "$build"/tests/cpp/$program \
    >"$build/$1-$2.log" 2>&1 || echo "exit status $?" >>"$build/$1-$2.log"
}
export -f sanitize
export build
rm -f $build/*check-*.log
for tool in "${tools[@]}"; do
  for suite in "${suites[@]}" fuzz; do echo "$tool $suite"; done
done | CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$((gpus - 1))} setsid \
  xargs -P "${SANITIZERS:-8}" -n 2 bash -c 'sanitize "$@"' sanitize &
sanitizers=$!

status=0  # A failing part does not stop the rest: one run tells everything.
ctest --test-dir $build -j "$(nproc)" --output-on-failure >$build/ctest.log || status=1
grep -A9999 "tests passed\|tests failed" $build/ctest.log
say "ctest: $(counts $build/ctest.log)"

workers=()
$python -c "import xdist" 2>/dev/null && workers=(-n "${PYTEST_WORKERS:-8}" --seed=$RANDOM)
PYTHONPATH="$site" $python -m pytest "${workers[@]}" >$build/pytest.log || status=1
grep -E "^(FAILED|ERROR)" $build/pytest.log || true
say "pytest: $(counts $build/pytest.log)"

wait $sanitizers || status=1
for tool in "${tools[@]}"; do
  clean=0
  for suite in "${suites[@]}" fuzz; do
    log=$build/$tool-$suite.log
    if grep -q "SUMMARY: 0 " "$log" && ! grep -q "exit status" "$log"; then
      clean=$((clean + 1))
    else
      status=1
      say "compute-sanitizer $tool, $suite:"
      tail -20 "$log"
    fi
  done
  say "compute-sanitizer $tool: $clean of $((${#suites[@]} + 1)) suites without an error"
done
exit $status
