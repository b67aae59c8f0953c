"""The wheel and the source distribution have what an installation needs, and nothing else.

Both are built from a copy of the checkout in ``build/packaging``, without a network, and installed into
environments of their own. One build folder serves both wheels, and it stays, so that the extension is
compiled once, and with few optimisations, which take most of a compiler's time.
"""

import functools
import os
import re
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build/packaging"
SOURCE = WORK / "source"
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
PACKAGES = ("python/neumuter/", "neumuter_kernels/")
TO_BUILD = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|neumuter_kernels\.egg-info/.*")
COMPILER = f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -Og\n'
COMPILED = f"neumuter_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class Built(NamedTuple):
    """The archives, and all that the tools printed while they built them."""

    sdist: Path
    wheel: Path
    wheel_of_sdist: Path
    printed: str


def checkout():
    """{path: content} of all files of the checkout but those that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    return {name: (ROOT / name).read_bytes() for name in listed if (ROOT / name).is_file()}


def unpacked(sdist):
    """{path: content} of a source distribution."""
    with tarfile.open(sdist) as archive:
        return {
            member.name.split("/", 1)[1]: archive.extractfile(member).read()
            for member in archive
            if member.isfile()
        }


def fill_source(files):
    """Make SOURCE these files alone. What stays the same is not written, so that it is not compiled again."""
    for path in [path for path in SOURCE.rglob("*") if not path.is_dir()]:
        if path.relative_to(SOURCE).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        path = SOURCE / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def run(*command, cwd, **variables):
    """What a command prints, which must succeed. It sees the paths that it was installed with alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments, cwd, **variables):
    options = ("--disable-pip-version-check", "--no-input")
    return run(sys.executable, "-m", "pip", *options, *arguments, cwd=cwd, **variables)


def build_wheel(out):
    """The wheel of SOURCE, and what was printed. It has no CUDA code, to spare its compilation."""
    variables = {"NEUMUTER_WITH_CUDA": "0", "CXX": str(WORK / "compiler")}
    printed = pip(
        "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, SOURCE,
        cwd=WORK, DIST_EXTRA_CONFIG=str(WORK / "build.cfg"), **variables,
    )  # fmt: skip
    (wheel,) = out.iterdir()
    return wheel, printed


@pytest.fixture(scope="module")
def files():
    return checkout()


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    SOURCE.mkdir(parents=True, exist_ok=True)
    (WORK / "build.cfg").write_text(f"[build]\nbuild_temp = {WORK}\n")
    if not (WORK / "compiler").exists():
        (WORK / "compiler").write_text(COMPILER)
        (WORK / "compiler").chmod(0o755)
    out = tmp_path_factory.mktemp("dist")
    fill_source(files)
    build_sdist = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    printed = run(sys.executable, "-c", build_sdist, out / "sdist", cwd=SOURCE)
    (sdist,) = (out / "sdist").iterdir()
    wheel, more = build_wheel(out / "wheel")
    fill_source(unpacked(sdist))
    wheel_of_sdist, most = build_wheel(out / "wheel_of_sdist")
    return Built(sdist, wheel, wheel_of_sdist, printed + more + most)


def test_building_warns_of_nothing_left_out(built):
    assert "would be ignored" not in built.printed
    assert not re.findall(r".*warning: no (?:previously-included )?files.*", built.printed)
    assert "deprecat" not in built.printed.lower()


def test_the_sdist_has_what_a_build_needs_and_nothing_else(built, files):
    found = unpacked(built.sdist)
    needed = {name for name in files if name in TO_BUILD or name.startswith((*PACKAGES, "csrc/"))}
    assert {name for name in found if not GENERATED.fullmatch(name)} == needed
    assert {name: found[name] for name in needed} == {name: files[name] for name in needed}


@pytest.mark.parametrize("which", ["wheel", "wheel_of_sdist"])
def test_a_wheel_has_all_files_of_both_packages_and_nothing_else(which, built, files):
    with zipfile.ZipFile(getattr(built, which)) as archive:
        information = f"neumuter_kernels-{VERSION}.dist-info/"
        found = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    packed = {name: content for name, content in found.items() if not name.startswith(information)}
    assert packed.pop(COMPILED)
    assert packed == {
        name.removeprefix("python/"): content for name, content in files.items() if name.startswith(PACKAGES)
    }
    assert found[f"{information}licenses/LICENSE"] == files["LICENSE"]
    plugin = b"[vllm.general_plugins]\nneumuter = neumuter.integrations.vllm:register"
    assert plugin in found[f"{information}entry_points.txt"]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Function: the Python and the packages of an environment with a wheel, and with what it depends on.

    Torch and the like are taken from the tests' environment.
    """

    @functools.cache
    def install(which):
        environment = tmp_path_factory.mktemp(which)
        venv.create(environment, symlinks=True)
        python = environment / "bin/python"
        pip("--python", python, "install", "--no-deps", "--no-index", getattr(built, which), cwd=environment)
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
        return python, packages

    return install


@pytest.mark.parametrize("which", ["wheel", "wheel_of_sdist"])
def test_it_runs_in_an_empty_environment(which, installed, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    python, packages = installed(which)

    code = "import neumuter as nm, neumuter_kernels as nk; print(nm.__version__, nm.__file__, nk.__file__)"
    version, *homes = run(python, "-c", code, cwd=elsewhere).split()
    assert version == VERSION
    assert homes == [str(packages / package / "__init__.py") for package in ("neumuter", "neumuter_kernels")]
    assert "unlearn" in run(python.with_name("neumuter"), "--help", cwd=elsewhere)
    assert "op select_muted" in run(python, "-m", "neumuter_kernels", cwd=elsewhere)
    assert not list(elsewhere.iterdir())


INSTALL = re.compile(r"^```bash\n([^`]*^pip install --no-build-isolation \.\n[^`]*)^```$", re.MULTILINE)


def test_python_in_a_checkout_says_that_its_sources_hide_the_package(installed, files, tmp_path):
    """And where the install instructions of each page lead, it works."""
    python, packages = installed("wheel")
    checkout = tmp_path / "checkout"
    for name, content in files.items():
        if name.startswith((*PACKAGES, "examples/")) or "/" not in name:
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes(content)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for arguments in (["-m", "neumuter_kernels"], ["-c", "import neumuter; neumuter.unlearn"]):
        done = subprocess.run([python, *arguments], cwd=checkout, env=clean, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"hides the package that is installed in {packages / 'neumuter_kernels'}" in done.stderr
    if sys.version_info >= (3, 11):
        assert "op select_muted" in run(python, "-m", "neumuter_kernels", cwd=checkout, PYTHONSAFEPATH="1")
    assert "unlearn" in run(python.with_name("neumuter"), "unlearn", "--help", cwd=checkout)
    (packages / "neumuter_kernels").rename(packages / "elsewhere")
    done = subprocess.run(
        [python, "-m", "neumuter_kernels"], cwd=checkout, env=clean, capture_output=True, text=True
    )
    assert f"run in {checkout}: pip install --no-build-isolation --editable ." in done.stderr
    (packages / "elsewhere").rename(packages / "neumuter_kernels")

    pages = {
        page: INSTALL.findall((ROOT / page).read_text()) for page in ("README.md", "docs/quick-start.md")
    }
    for page, (code,) in pages.items():
        moves = [line for line in code.splitlines() if not line.startswith(("pip ", "neumuter doctor"))]
        script = "\n".join(
            [*moves, "\"$0\" -c 'import neumuter, neumuter_kernels; print(neumuter.__file__)'"]
        )
        assert str(packages) in run("bash", "-ec", script, python, cwd=checkout), page


@pytest.mark.parametrize(
    ("version", "missing"),
    [("65.5.0", "torch, pybind11, setuptools 77 or newer (found 65.5"), ("77.0", "torch, pybind11.")],
)
def test_what_is_missing_is_said_before_anything_is_downloaded(files, version, missing, tmp_path):
    """pip's first hook, with --no-build-isolation, where there is nothing but setuptools."""
    source, packages = tmp_path / "source", tmp_path / "packages"
    packages.mkdir()
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (home := Path(setuptools.__file__).parents[1] / name).exists():
            (packages / name).symlink_to(home)
    for name in TO_BUILD & files.keys():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(files[name])
    code = f"""
import sys
sys.path.append({str(packages)!r})
import setuptools, setuptools.build_meta
setuptools.__version__ = {version!r}
setuptools.build_meta.get_requires_for_build_wheel()
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=source, capture_output=True, text=True
    )
    assert f"this is missing: {missing}" in " ".join(done.stderr.split()), done.stderr
    assert "pip install torch cmake ninja pybind11 'setuptools>=77'" in done.stderr
    assert done.returncode != 0


def test_pip_builds_with_the_torch_that_it_installs():
    """In an environment of the build's own, which has what pyproject.toml lists and no other torch."""
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    (torch,) = re.findall(r'"(torch[^"]*)"', requires)
    assert f'dependencies = [\n  "{torch}",' in text
    assert '"setuptools>=77"' in requires


@pytest.mark.parametrize(
    ("variable", "version", "message"),
    [
        ("OFF", "2.14.1+cpu", "NEUMUTER_WITH_CUDA must be 0 or 1, got 'OFF'"),
        ("0", "2.6.0+cpu", r"torch must be 2\.10 or newer, found 2\.6\.0\+cpu"),
    ],
)
def test_what_cannot_be_built_is_said_before_it_is_compiled(variable, version, message, tmp_path):
    """A stub of torch stands in for an older one."""
    (tmp_path / "torch.py").write_text(
        f"from types import SimpleNamespace\n__path__ = ['']\n__version__ = {version!r}\n"
        "version = SimpleNamespace(cuda=None)\n"
    )
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "NEUMUTER_WITH_CUDA": variable, "PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout
