"""The native core where its Python cannot run here: under sanitizers, and other processors by emulation."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIMDE = Path("/usr/include/simde")
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


def test_x86_levels_that_this_machine_lacks(tmp_path):
    if platform.machine() not in ("x86_64", "AMD64") or not SIMDE.is_dir():
        pytest.skip("needs an x86 machine and libsimde-dev")
    said = run(build(tmp_path, "-DHSR_EMULATE=ON", "-DCMAKE_BUILD_TYPE=Release"))
    assert "WRONG" not in said
    assert all(f"-- {level}" in said for level in ("avx2", "avxvnni", "avx512"))


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
