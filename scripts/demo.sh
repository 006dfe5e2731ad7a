#!/usr/bin/env bash
# Sets up .venv and runs the demo in it; arguments go to `binconv demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/binconv demo "$@"
