"""Builds wheels for every system on one Linux machine, and checks them: `python -m wheels`, or `make wheels`.

The compiler is zig's (the package `ziglang`): clang with the C libraries of all targets. docs/platforms.md tells what
of the result was run and what was only built.
"""
