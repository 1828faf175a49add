import os
import subprocess
import sys

import pytest

import scantly


def test_every_public_name_is_there_and_documented():
    for name in scantly.__all__:
        value = getattr(scantly, name)
        assert isinstance(value, str) or value.__doc__, name
    assert set(dir(scantly)) == set(scantly.__all__)


def test_importing_scantly_imports_nothing_heavy():
    code = "import sys, scantly; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pandas', 'monai')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        scantly.trian  # noqa: B018


ORDERS = """
import os, sys
import torch, pandas, pydantic, monai, nibabel, matplotlib, typer, lightning.fabric  # once, for all the processes below
names = [name for name in sys.argv[1].split(",")]

def use(name):
    import scantly
    value = getattr(scantly, name)
    if name == "methods":
        assert "supervised" in value() and value.catalogue.methods() == value()
    elif name in ("Method", "Run", "ScantlyError"):
        assert isinstance(value, type), value
    elif name == "__version__":
        assert isinstance(value, str)
    else:
        try:
            value()
        except TypeError as error:  # called as a function, without what it needs
            assert f"{value.__name__}() missing" in str(error), error

def in_a_process_of_its_own(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def first(name):
    use(name)
    failed = [other for other in names if not in_a_process_of_its_own(lambda: (use(other), use(name)))]
    assert not failed, f"after {name}: {failed}"

assert "scantly" not in sys.modules
sys.exit(not all([in_a_process_of_its_own(lambda name=name: first(name)) for name in names]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fresh interpreter for each pair takes too long")
def test_every_public_name_survives_every_order_of_use():
    names = ",".join(scantly.__all__)
    done = subprocess.run([sys.executable, "-c", ORDERS, names], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "first", ["import scantly.methods.base", "from scantly.methods import catalogue", "import scantly"]
)
def test_the_package_of_methods_can_be_imported_and_called(first):
    code = f"""
{first}
import scantly
assert "mean_teacher" in scantly.methods()
import scantly.methods.catalogue as there
from scantly.methods import catalogue
from scantly import methods
assert methods is scantly.methods and there is catalogue and scantly.methods.catalogue is catalogue
assert methods() == catalogue.methods()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
