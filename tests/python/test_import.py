"""What importing binconv does and does not do, and which source may include or import which."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import binconv

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "cpp"
PACKAGE = ROOT / "python" / "binconv"


def run_python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# ------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("framework", ["torch", "numpy", "cupy", "jax", "sklearn", "matplotlib"])
def test_import_binconv_imports_no_framework(framework):
    loaded = run_python(
        "import sys, binconv\n"
        f"print([name for name in sys.modules if name.split('.')[0] == '{framework}'])"
    )
    assert loaded.strip() == "[]"


def test_import_prints_nothing_and_starts_nothing():
    assert run_python("import binconv") == ""
    assert run_python("import binconv, threading; assert threading.active_count() == 1") == ""


def test_neutral_functions_work_without_any_framework():
    program = (
        "import binconv, ctypes, sys\n"
        "memory = ctypes.create_string_buffer(64 + 16)\n"
        "assert binconv.packed_bytes(130) == 32\n"
        "shape = binconv.WeightShape(8, 16, 3, 3)\n"
        "assert binconv.prepared_weight_bytes(shape) > 0\n"
        "assert binconv.kernel_name(binconv.Conv2dShape(1, 5, 5, shape))\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    assert run_python(program) == ""


def test_import_binconv_torch_twice_registers_once():
    program = (
        "import binconv.torch, importlib, sys\n"
        "import torch\n"
        "assert hasattr(torch.ops, 'binconv')\n"
        "importlib.import_module('binconv.torch')\n"
    )
    assert run_python(program) == ""


def test_objects_that_outlive_the_module_print_nothing_at_exit():
    program = (
        "import binconv, sys\n"
        "shape = binconv.Conv2dShape(1, 5, 5, binconv.WeightShape(8, 16, 3, 3))\n"
        "sys.kept_to_the_end = [shape]\n"
    )
    assert run_python(program) == ""


# ------------------------------------------------------------------------------------------- typing


def stub_names(path):
    tree = ast.parse(path.read_text())
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = ast.get_docstring(node)
        elif isinstance(node, ast.AnnAssign):
            names[node.target.id] = None
        elif isinstance(node, ast.Assign):
            names.update(dict.fromkeys((target.id for target in node.targets), None))
    return names


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_extension_exports_nothing_but_its_start():
    command = ["nm", "--dynamic", "--defined-only", binconv._binconv.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__binconv"]


def test_torch_can_be_imported_after_binconv():
    code = """
import binconv, torch
try:
    binconv.packed_bytes(0)
except ValueError as error:
    assert "got 0" in str(error), error
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_binconv.pyi").is_file()


def test_every_public_name_exists_and_is_documented():
    stub = stub_names(PACKAGE / "_binconv.pyi")
    assert len(set(binconv.__all__)) == len(binconv.__all__)
    for name in binconv.__all__:
        value = getattr(binconv, name)
        if name != "__version__":
            assert stub.get(name) or value.__doc__, f"{name} has no docstring, nor has its stub"
    assert binconv.__doc__


def test_stub_has_exactly_the_names_of_the_compiled_module():
    from binconv import _binconv

    compiled = {name for name in dir(_binconv) if not name.startswith("_")}
    helpers = {"Array", "Layout"}
    assert set(stub_names(PACKAGE / "_binconv.pyi")) - helpers == compiled


def test_stub_functions_have_the_parameters_of_the_compiled_ones():
    from binconv import _binconv

    for node in ast.parse((PACKAGE / "_binconv.pyi").read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        signature = getattr(_binconv, node.name).__doc__.splitlines()[0]
        for argument in (*node.args.args, *node.args.kwonlyargs):
            assert re.search(rf"\b{argument.arg}\b", signature), f"{node.name}: {argument.arg}"
        count = len(node.args.args) + len(node.args.kwonlyargs)
        parameters = re.sub(r"\[[^]]*\]|= \([^)]*\)", "", signature)
        assert parameters.count(":") == count, f"{node.name}: {signature}"


def test_every_public_torch_name_exists_and_is_documented():
    import binconv.torch

    fixed = {
        "BinaryConv2d",
        "BinaryConv2dCutlass",
        "BitTensor",
        "binary_conv2d",
        "pack_bits",
        "pack_weight",
        "prepare_weight",
    }
    assert fixed <= set(binconv.torch.__all__)
    for name in binconv.torch.__all__:
        assert getattr(binconv.torch, name).__doc__, f"{name} has no docstring"


# ----------------------------------------------------------------------------------------- layering


def includes(path):
    """(quoted, name) of every include of a C++ or CUDA file."""
    for line in path.read_text().splitlines():
        match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if match:
            yield match[1] == '"', match[2]


def sources(folder, *patterns, recursive=True):
    assert folder.is_dir()
    find = folder.rglob if recursive else folder.glob
    return sorted(path for pattern in patterns for path in find(pattern))


def is_standard(name):
    """A C++ standard header: lower case, no folder, no extension."""
    return re.fullmatch(r"[a-z_]+", name) is not None


def resolve(path, name):
    """The own file that a quoted include of `path` means, or None."""
    for folder in (path.parent, CPP / "src", CPP / "include"):
        if (folder / name).is_file():
            return (folder / name).resolve()
    return None


SOURCE_PATTERNS = ("*.h", "*.hpp", "*.cpp", "*.cc", "*.cu", "*.cuh", "*.inl")
VECTOR_HEADERS = {"immintrin.h", "arm_neon.h"}


def test_public_headers_include_public_and_standard_headers_only():
    headers = sources(CPP / "include", *SOURCE_PATTERNS)
    assert headers
    for path in headers:
        for _, name in includes(path):
            public = name.startswith("binconv/") and (CPP / "include" / name).is_file()
            assert public or is_standard(name), f"{path.name} includes {name}"


def test_host_sources_reach_no_gpu_or_framework_header():
    """Follows the includes of cpp/src/*: what is not our own file is a standard header."""
    pending = sources(CPP / "src", *SOURCE_PATTERNS, recursive=False)
    assert pending
    seen = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        assert path.suffix not in (".cu", ".cuh"), f"{path.name} is reached from host code"
        for quoted, name in includes(path):
            own = resolve(path, name) if quoted else None
            if own:
                pending.append(own)
            else:
                assert is_standard(name), f"{path.relative_to(ROOT)} includes {name}"


def test_cpu_sources_include_src_standard_and_vector_headers_only():
    files = sources(CPP / "src" / "cpu", *SOURCE_PATTERNS)
    assert files
    for path in files:
        for quoted, name in includes(path):
            own = resolve(path, name) if quoted else None
            allowed = own or is_standard(name) or name in VECTOR_HEADERS
            assert allowed, f"{path.name} includes {name}"
            assert not own or "cuda" not in own.relative_to(CPP).parts, (
                f"{path.name} includes {name}"
            )


def test_cutlass_is_used_in_the_cuda_folder_only():
    for folder in (CPP, ROOT / "python"):
        for path in sources(folder, *SOURCE_PATTERNS):
            if path.is_relative_to(CPP / "src" / "cuda"):
                continue
            for _, name in includes(path):
                assert name.split("/")[0] not in ("cutlass", "cute"), f"{path} includes {name}"


def test_cuda_sources_know_no_framework_and_no_cpu_code():
    allowed = re.compile(r"cuda[a-z_0-9]*\.h|cu(tlass|te|b|da)/.+|[a-z_]+")
    for path in sources(CPP / "src" / "cuda", *SOURCE_PATTERNS):
        for quoted, name in includes(path):
            own = resolve(path, name) if quoted else None
            assert own or allowed.fullmatch(name), f"{path.name} includes {name}"
            assert not own or "cpu" not in own.relative_to(CPP).parts, (
                f"{path.name} includes {name}"
            )


def test_no_source_of_the_library_includes_python_or_torch():
    forbidden = ("Python.h", "torch", "ATen", "c10", "pybind11", "nanobind", "numpy")
    for path in sources(CPP, *SOURCE_PATTERNS):
        for _, name in includes(path):
            assert name.split("/")[0] not in forbidden, f"{path} includes {name}"


def test_bindings_include_public_headers_nanobind_and_standard_headers_only():
    files = sources(ROOT / "python", *SOURCE_PATTERNS)
    assert {"bindings.cpp", "arrays.cpp", "operators.cpp", "tensor.h"} <= {
        path.name for path in files
    }
    for path in files:
        for quoted, name in includes(path):
            allowed = (
                (quoted and (path.parent / name).is_file())
                or (name.startswith("binconv/") and (CPP / "include" / name).is_file())
                or name.startswith("nanobind/")
                or is_standard(name)
                or (path.name, name) == ("tensor.cpp", "dlfcn.h")
            )
            assert allowed, f"{path.name} includes {name}"


def imports(path):
    """(module, lazily) of every import: whether it is inside a function."""

    def walk(node, lazily):
        for child in ast.iter_child_nodes(node):
            inner = lazily or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazily) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield "." * child.level + (child.module or ""), lazily
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            else:
                yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text()), False)


def neutral_modules():
    torch_folder = PACKAGE / "torch"
    files = [p for p in sources(PACKAGE, "*.py") if not p.is_relative_to(torch_folder)]
    assert files
    return files


def is_command_line(path):
    return path.name == "__main__.py"


def test_neutral_python_imports_nothing_but_the_standard_library():
    for path in neutral_modules():
        for module, lazily in imports(path):
            top = module.split(".")[0]
            if lazily and is_command_line(path):
                continue
            own = module.startswith(".") or top == "binconv"
            assert own or top in sys.stdlib_module_names, f"{path.name} imports {module}"


def test_neutral_python_does_not_import_the_torch_layer():
    for path in neutral_modules():
        for module, lazily in imports(path):
            if lazily and is_command_line(path):
                continue
            assert not re.match(r"\.*torch\b|binconv\.torch\b", module), (
                f"{path.name} imports {module}"
            )


def test_torch_layer_imports_torch_and_binconv_only():
    files = sources(PACKAGE / "torch", "*.py")
    assert files
    for path in files:
        for module, _ in imports(path):
            top = module.split(".")[0]
            allowed = module.startswith(".") or top in ("torch", "binconv")
            if path.name in ("demo.py", "train.py"):  # Imported by the command line alone.
                allowed = allowed or top in ("matplotlib", "sklearn", "tqdm", "PIL")
            if path.match("bench/plots.py"):
                allowed = allowed or top == "matplotlib"
            assert allowed or top in sys.stdlib_module_names, f"{path.name} imports {module}"
            finds_kernels = path.name == "ops.py"
            assert finds_kernels or "_binconv" not in module, f"{path.name} imports {module}"
