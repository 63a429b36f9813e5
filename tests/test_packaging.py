"""What a stranger installs: the wheel, in an environment that has never seen the checkout."""

import ast
import json
import os
import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest

import mbrl

ROOT = Path(__file__).parent.parent
EMBEDDED = sorted((ROOT / "envs" / "mbrl_envs" / "data").glob("*.hdf5"))
MIB = 2**20


def call(*command, cwd, **env):
    """Standard output; the test fails with everything that was printed where the command fails."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, command)),
        check=False,
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_whatever_is_asked_for_is_pinned():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = asked["project"]
    needs = [*asked["build-system"]["requires"], *project["dependencies"], *project["optional-dependencies"]["dev"]]
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert {re.match(r"[\w-]+", x)[0] for x in needs} <= {*pins}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of an environment that holds the wheel, and the dependencies of this one, but not the checkout."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "env", with_pip=False, symlinks=True)
    python = home / "env" / "bin" / "python"
    own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    # A line of a .pth file is added to the path, after the environment's own; .pth files of that folder are not read,
    # so that an editable install there stays unseen.
    folders = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (own / "dependencies.pth").write_text("\n".join(folders) + "\n")
    return python


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"mbrl_suite-{mbrl.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"mbrl", "mbrl_envs", info}
    inside = {name for name in names if not name.startswith(info)}
    want = set()
    for package in (ROOT / "mbrl", ROOT / "envs" / "mbrl_envs"):
        files = [*package.rglob("*.py"), *package.rglob("py.typed"), *package.rglob("*.[ch]"), *package.rglob("data/*")]
        want |= {str(f.relative_to(package.parent)) for f in files if f.is_file()}
    assert {"mbrl/py.typed", "mbrl_envs/py.typed"} <= inside
    assert inside == want


def test_the_wheel_is_small(wheel):
    for data in EMBEDDED:
        assert data.stat().st_size < 2.5 * MIB, f"{data.name} is {data.stat().st_size / MIB:.2f} MiB"
    assert wheel.stat().st_size < 1 * MIB + sum(data.stat().st_size for data in EMBEDDED)


def test_the_metadata_names_the_command_the_licence_and_the_pythons(wheel):
    info = f"mbrl_suite-{mbrl.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        meta = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert "mbrl = mbrl.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert (meta["Name"], meta["Version"], meta["License-Expression"]) == ("mbrl-suite", mbrl.__version__, "Apache-2.0")
    assert meta["Requires-Python"] == ">=3.11"
    required = {line.partition(";")[0].strip() for line in meta.get_all("Requires-Dist") if "extra ==" not in line}
    assert any(line.startswith("torch") for line in required)
    assert not any("@" in line or "==" in line for line in required), "a library does not pin its user's versions"


OUTSIDE = """
import json, sys
import torch
import mbrl, mbrl_envs
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.testing import CHECKS, check_dynamics
from mbrl_envs import datasets

torch.set_num_threads(1)
config = EnsembleConfig(members=2, elites=2, hidden=(8,), weight_decay=(0.0, 0.0))
check_dynamics(config.build, skip=[c for c in CHECKS if "compiles" in c])

sets = {name: len(datasets.load(name)) for name in datasets.embedded()}
print(json.dumps({"mbrl": mbrl.__file__, "mbrl_envs": mbrl_envs.__file__, "sets": sets, "path": sys.path}))
"""


def test_it_works_outside_the_checkout(installed, tmp_path):
    said = json.loads(call(installed, "-c", OUTSIDE, cwd=tmp_path).splitlines()[-1])
    for name in ("mbrl", "mbrl_envs"):
        path = Path(said[name])
        assert installed.parent.parent in path.parents, f"{name} was imported from {path}, not from the wheel"
    assert not [p for p in said["path"] if Path(p) in (ROOT, ROOT / "envs")]
    assert list(said["sets"]) == [f"embedded:{data.stem}" for data in EMBEDDED]
    assert all(rows >= 1000 for rows in said["sets"].values())


def test_the_command_line_is_installed(installed, tmp_path):
    command = installed.with_name("mbrl")
    assert command.read_text().startswith(f"#!{installed}")
    text = call(command, "--help", cwd=tmp_path)
    for verb in ("offline", "eval", "data", "collect", "list", "suite", "demo"):
        assert verb in text
    options = ("--updates", 2, "--episodes", 1, "--seeds", 0, "--quiet", "algorithm:bc", "--algorithm.agent.hidden", 8)
    call(command, "offline", "--dataset", "embedded:pendulum", *options, cwd=tmp_path)
    (result,) = tmp_path.glob("runs/*/bc-*/result.json")
    assert json.loads(result.read_text())["updates"] == 2


def test_every_import_is_a_declared_requirement():
    """The environment of the tests has more than a user's: what the package imports must be among its requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [v for name, v in project["optional-dependencies"].items() if name != "dev"]
    lines = [*project["dependencies"], *(line for v in extras for line in v)]
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    owners = metadata.packages_distributions()
    missing = {}
    for path in [*(ROOT / "mbrl").rglob("*.py"), *(ROOT / "envs" / "mbrl_envs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in (
                {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"mbrl", "mbrl_envs"}
            ):
                if not declared & {normal(d) for d in owners.get(top, [top])}:
                    missing[top] = path.name
    assert not missing
