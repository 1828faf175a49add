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
