#!/usr/bin/env bash
# Sets up .venv, then builds and tests the C++ library (ctest) and the Python package (pytest).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
cmake --preset release
cmake --build --preset release
ctest --preset release | tee build/ctest.log
echo "$(grep -c "(Skipped)" build/ctest.log || true) suites were skipped for want of a CUDA GPU"
python -m pytest
