#!/usr/bin/env bash
# Makes .venv with binconv, built from this tree, and all that its demo, tests and checks need.
# An existing PyTorch is used; otherwise TORCH (default torch==2.13.0) is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  inherit=()
  python3 -c "import torch" 2>/dev/null && inherit=(--system-site-packages)
  python3 -m venv "${inherit[@]}" .venv
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
.venv/bin/python -c "import torch" 2>/dev/null || "${pip[@]}" "${TORCH:-torch==2.13.0}"
"${pip[@]}" -r requirements-dev.txt
echo "Building binconv ..."
"${pip[@]}" ".[demo,test]"
