"""What mypy cannot see of the types. ``make check`` runs mypy itself, also on tests/repo/typed_use.py."""

import ast
import warnings
from pathlib import Path

import pytest
from setuptools import Distribution

import neumuter

ROOT = Path(__file__).parents[2]


def test_type_checkers_are_told_of_every_public_name():
    told = {
        (alias.asname, node.module)
        for block in ast.parse(Path(neumuter.__file__).read_text()).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {(name, f"neumuter.{home}") for name, home in neumuter._HOMES.items()}
    assert told == names | {(name, "neumuter") for name in neumuter._TOOLS}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "neumuter_kernels/triton").glob("*.py")), ids=lambda f: f.stem
)
def test_of_the_triton_files_only_kernels_lack_annotations(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and not any(
            "triton.jit" in ast.unparse(d) for d in node.decorator_list
        ):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
            assert node.returns is not None, node.name
            assert not bare, (node.name, bare)


def test_the_packages_are_installed_with_their_types(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    with warnings.catch_warnings():  # of a class that pytest's workers cannot send on
        warnings.simplefilter("ignore")
        files = {(package, name) for package, _, _, names in command.data_files for name in names}
    assert files >= {
        ("neumuter", "py.typed"),
        ("neumuter_kernels", "py.typed"),
        ("neumuter_kernels", "_C.pyi"),
    }
