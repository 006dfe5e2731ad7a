#!/usr/bin/env bash
# Formats and static checks, with the tools in .venv (scripts/setup.sh) or on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
git ls-files --cached --others --exclude-standard -- '*.h' '*.cpp' '*.cu' '*.cuh' |
  xargs clang-format --dry-run --Werror
