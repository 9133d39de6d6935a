"""Our ``kernels`` package shares its name with an unrelated one that transformers looks for."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]


def test_transformers_takes_ours_for_nobodys():
    check = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_kernels_available
import kernels
assert Path(kernels.__file__) == Path(sys.argv[1], "kernels", "__init__.py"), kernels.__file__
assert not is_kernels_available()
"""
    subprocess.run([sys.executable, "-c", check, str(ROOT)], check=True, cwd="/")


def test_the_package_imports_nothing():
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_kvpilots_version_is_none_that_transformers_accepts():
    """It takes the version of the distribution that a top-level package belongs to for the package's own."""
    from transformers.utils import import_utils

    least, most = Version(import_utils.KERNELS_MIN_VERSION), Version(import_utils.KERNELS_MAX_VERSION)
    assert least < most
    assert not least <= Version(version("kvpilot")) <= most
