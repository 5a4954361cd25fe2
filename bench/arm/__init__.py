"""Instructions that the NEON kernels take, counted under qemu-user: `python -m bench.arm`. Counts are not times.

count.c      a plugin of qemu-user: how often each instruction ran
linear.cpp   runs one linear kernel
__main__.py  builds both, counts, writes bench/results/arm.json and docs/performance.md
"""
