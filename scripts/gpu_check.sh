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

: >"$report"
say() { echo "$@" | tee -a "$report"; }
counts() { grep -E "tests passed|tests failed|passed|failed" "$1" | tail -1; }

say "# GPU check"
say "commit: ${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
say "GPU, driver: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
say "nvcc: $(nvcc --version | sed -n 's/.*release \([^,]*\),.*/\1/p')"

cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBINCONV_CUDA=ON \
  -DBINCONV_CUTLASS_DIR="$cutlass" ${CMAKE_CUDA_ARCHITECTURES:+-DCMAKE_CUDA_ARCHITECTURES="$CMAKE_CUDA_ARCHITECTURES"}
cmake --build $build
status=0  # A failing part does not stop the rest: one run tells everything.
ctest --test-dir $build --output-on-failure | tee $build/ctest.log || status=1
say "ctest: $(counts $build/ctest.log)"

site=$PWD/$build/site
rm -rf "$site"
$python -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" . \
  -C cmake.define.BINCONV_CUDA=ON -C cmake.define.BINCONV_CUTLASS_DIR="$cutlass" \
  ${CMAKE_CUDA_ARCHITECTURES:+-C cmake.define.CMAKE_CUDA_ARCHITECTURES="$CMAKE_CUDA_ARCHITECTURES"}
PYTHONPATH="$site" $python -m pytest | tee $build/pytest.log || status=1
say "pytest: $(counts $build/pytest.log)"

# The tests ask for a device that does not exist; memcheck would call the refusal an error.
options_of() { if [ "$1" = memcheck ]; then echo --report-api-errors no; fi; }
for tool in memcheck racecheck initcheck synccheck; do
  for program in "binconv_tests --device=cuda" "binconv_fuzz 0 60 cuda"; do
    # shellcheck disable=SC2046,SC2086  # options; a program and its arguments
    compute-sanitizer --tool $tool $(options_of $tool) --error-exitcode 1 \
      $build/tests/cpp/$program >$build/$tool.log 2>&1 || { status=1; tail -50 $build/$tool.log; }
    say "compute-sanitizer $tool, $program: $(grep "ERROR SUMMARY\|RACECHECK SUMMARY" $build/$tool.log | tail -1)"
  done
done
exit $status
