"""The systems that wheels are built for."""

from __future__ import annotations

from dataclasses import dataclass

PYTHONS = ("3.11", "3.12", "3.13", "3.14")


@dataclass(frozen=True)
class Target:
    """A system: how zig, pip and CPython name it."""

    name: str
    zig: str  # -target
    platform: str  # the last part of a wheel's tag
    suffix: str  # of an extension; {nodot} is "312"
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        """linux, macos or windows."""
        return self.name.partition("_")[0]

    def extension(self, python: str) -> str:
        """The file name of the extension for a Python: `_native.cpython-312-x86_64-linux-gnu.so`."""
        return "_native" + self.suffix.format(nodot=python.replace(".", ""))

    def tag(self, python: str) -> str:
        """The tag of the wheel: `cp312-cp312-win_amd64`."""
        version = "cp" + python.replace(".", "")
        return f"{version}-{version}-{self.platform}"


# clang's early scheduling spills registers in the NEON kernels (setup.py has the same flag).
ARM = ("-mllvm", "-enable-misched=false")
# CPython's functions are those of the process that loads the extension.
MACOS = ("-Wl,-undefined,dynamic_lookup",)

TARGETS = {
    target.name: target
    for target in (
        Target(
            "linux_x86_64",
            "x86_64-linux-gnu.2.28",
            "manylinux_2_28_x86_64",
            ".cpython-{nodot}-x86_64-linux-gnu.so",
        ),
        Target(
            "linux_aarch64",
            "aarch64-linux-gnu.2.28",
            "manylinux_2_28_aarch64",
            ".cpython-{nodot}-aarch64-linux-gnu.so",
            ARM,
        ),
        Target("macos_arm64", "aarch64-macos.13.0", "macosx_13_0_arm64", ".cpython-{nodot}-darwin.so", ARM, MACOS),
        Target("macos_x86_64", "x86_64-macos.13.0", "macosx_13_0_x86_64", ".cpython-{nodot}-darwin.so", (), MACOS),
        Target("windows_x86_64", "x86_64-windows-gnu", "win_amd64", ".cp{nodot}-win_amd64.pyd"),
    )
}
