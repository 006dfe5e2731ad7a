import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(language, file="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_quick_start_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("code", blocks("python", "docs/training.md"))
def test_training_example_runs(code):
    exec(compile(code, "docs/training.md", "exec"), {})


def test_cpp_quick_start_is_the_program_that_ctest_builds_and_runs():
    assert blocks("cpp") == [(ROOT / "tests/cpp/consumer/main.cpp").read_text()]
