"""The native core where its Python cannot run here: under sanitizers, and on ARM by emulation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def build(directory, *options):
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=beside)
    if cmake is None:
        pytest.skip("needs cmake")
    run(cmake, "-S", ROOT, "-B", directory, "-DHSR_NATIVE_CHECK=ON", *options)
    run(cmake, "--build", directory, "-j", "2")
    return directory / "check"


def test_every_level_is_clean_under_sanitizers(tmp_path):
    said = run(build(tmp_path, "-DHSR_SANITIZE=ON"))
    assert "-- scalar" in said and "WRONG" not in said


def test_arm(tmp_path):
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64-static"))
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static")
    program = build(
        tmp_path,
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert "WRONG" not in run(emulator, program)
