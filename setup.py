"""Builds `edgeformer._native`, the C++ engine. Everything else about the package stands in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs without it and `edgeformer doctor` says so.

Environment:
    EDGEFORMER_DEBUG=1             -O1 with asserts
    EDGEFORMER_SANITIZE=address    AddressSanitizer and UndefinedBehaviorSanitizer, -O1;  `thread`: ThreadSanitizer;
                                   `fuzz`: as `address`, with libFuzzer's coverage (needs CC=clang CXX=clang++)
    EDGEFORMER_NATIVE=0            do not build it;  1: a failed build is an error
"""

import glob
import os
import platform
import subprocess

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

sources = sorted(glob.glob("csrc/**/*.cpp", recursive=True))
headers = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.inl", recursive=True))

debug = os.environ.get("EDGEFORMER_DEBUG", "0") not in ("", "0")
sanitize = os.environ.get("EDGEFORMER_SANITIZE", "")
native = os.environ.get("EDGEFORMER_NATIVE", "")
sanitizers = {"": [], "address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread"]}
sanitizers["fuzz"] = ["-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=undefined"]
if sanitize not in sanitizers:
    raise SystemExit(f"EDGEFORMER_SANITIZE is {sanitize!r}, expected 'address', 'thread' or 'fuzz'")

# -ffp-contract=off is load-bearing: a compiler that may fuse a*b+c by itself breaks the law of the same bits.
# No -march here: a kernel file opens its own target region, so nothing else in the binary is compiled for a newer CPU.
compile_args = ["-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]
compile_args += ["-O1", "-g", "-UNDEBUG"] if debug else ["-O1", "-g1"] if sanitize else ["-O3", "-g0"]
if sanitize:
    # -O3 of the instrumented SIMD files takes minutes, and finds nothing that -O1 does not; so do checks that are
    # written out at each of their thousands of accesses, and UndefinedBehaviorSanitizer's of what the other one sees.
    compile_args += ["-fno-omit-frame-pointer", *sanitizers[sanitize]]
    if sanitize == "fuzz":
        compile_args += ["-fno-sanitize=null,object-size,vptr,function"]
    if sanitize == "address":
        compile_args += ["-fno-sanitize=null,object-size,vptr", "--param", "asan-instrumentation-with-call-threshold=0"]


def out_of_date(obj: str, src: str) -> bool:
    """Whether `obj` is older than its source or than any header: rebuilds in place stay short, and are never stale."""
    return not os.path.exists(obj) or os.path.getmtime(obj) < max(map(os.path.getmtime, [src, "setup.py", *headers]))


class Build(build_ext):
    """build_ext with one flag more for clang on ARM."""

    def build_extensions(self) -> None:
        """Builds without clang's early scheduling, which spills registers in the kernels. GCC: see the sources."""
        flags = ["-mllvm", "-enable-misched=false"]
        if platform.machine() in ("arm64", "aarch64") and accepts(self.compiler.compiler_cxx, flags):
            for extension in self.extensions:
                extension.extra_compile_args += flags
        super().build_extensions()


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows the flags."""
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


ParallelCompile(default=os.cpu_count() or 1, needs_recompile=out_of_date).install()
extension = Pybind11Extension(
    "edgeformer._native",
    sources,
    depends=headers,
    cxx_std=17,
    extra_compile_args=compile_args,
    include_dirs=["csrc"],
    # Under atheris the sanitizers' code comes from its own library, which is preloaded.
    extra_link_args=["-pthread", *([] if sanitize == "fuzz" else sanitizers[sanitize])],
    optional=native != "1",
)
setup(ext_modules=[] if native == "0" else [extension], cmdclass={"build_ext": Build})
