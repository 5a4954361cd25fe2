"""llama-server as the PyPI wheel of xllamacpp has it: built for AVX2, so slower than one built for this machine.

    PYTHON xllamacpp_server.py FILE PORT THREADS SLOTS CONTEXT ALIAS

Runs in the peer's environment. Settings are those of `servers.llama_server`.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    file, port, threads, slots, context, alias = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.model_alias = {alias}
    params.port, params.ui = int(port), False
    params.n_parallel, params.n_ctx = int(slots), int(context) * int(slots)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
