"""What may import what, and where an accelerator may be named."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = "import sys; sys.path[:0] = ['.', 'envs']; from importlinter.cli import lint_imports_command as run; run()"


def lint(folder):
    """The exit status and the report as one line."""
    command = [sys.executable, "-c", CODE, "--no-cache"]
    done = subprocess.run(
        command, check=False, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_imports_go_down_the_layers_only():
    code, report = lint(ROOT)
    assert code == 0, report


def test_an_import_that_is_forbidden_is_found(tmp_path):
    """The contracts themselves: in a copy of the tree, an import of each forbidden kind is named."""
    for name in ("mbrl", "envs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.hdf5"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    forbidden = [
        ("mbrl.core", "mbrl.data"),
        ("mbrl.dynamics.filtered", "mbrl.dynamics.ensemble"),
        ("mbrl.rollout", "gymnasium"),
        ("mbrl.sac", "mbrl_envs.tasks"),
        ("mbrl_envs.tasks", "mbrl.sac"),
    ]
    for importer, imported in forbidden:
        root = tmp_path / ("envs" if importer.startswith("mbrl_envs") else "")
        with open(root / f"{importer.replace('.', '/')}.py", "a") as file:
            file.write(f"\nimport {imported}\n")
    (tmp_path / "mbrl" / "stray.py").touch()  # a module that has no layer
    code, report = lint(tmp_path)
    assert code == 1
    for importer, imported in forbidden:
        assert f"{importer} -> {imported}" in report
    assert "stray" in report
    assert "0 kept, 4 broken" in report


def test_accelerators_are_named_in_one_file():
    """Device and dtype come from tensors: code that names a device cannot run on another."""
    files = [*ROOT.glob("mbrl/**/*.py"), *ROOT.glob("envs/**/*.py")]
    naming = [str(f.relative_to(ROOT)) for f in files if re.search("cuda", f.read_text(), re.IGNORECASE)]
    assert naming == ["mbrl/device.py"]
