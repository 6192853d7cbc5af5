"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys

from lab.cli.root import run


def test_help_lists_itself_and_exits_with_zero(capsys):
    assert run(["--help"]) == 0
    assert "KNOWLAB_DEBUG" in capsys.readouterr().out


def test_version_is_the_installed_one(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_help_does_not_load_the_heavy_libraries():
    code = (
        "import sys\n"
        "from lab.cli.root import run\n"
        "assert run(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'datasets', 'numpy'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)\n"
        "sys.exit(bool(heavy))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
