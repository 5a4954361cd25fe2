"""Serves bundles from several nodes of a Ray cluster: each replica is the server of `edgeformer serve`.

    python examples/ray_serve.py BUNDLE... --replicas 2 --threads 4

The address is http://127.0.0.1:8000 on each node that has a replica, and on the head. `--host 0.0.0.0` needs a key in
EDGEFORMER_API_KEY, on each node.
Ray Serve sends a request to the replica with the fewest; each has its own prefix cache, queue and /metrics. BUNDLE must
be there on each node, under the same path. Needs the extras `serve` and `ray`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve

from edgeformer.server.options import ServeOptions


def application(bundles: Sequence[str], options: ServeOptions, replicas: int, threads: int) -> Any:
    """The Serve application of so many replicas. `bundles` are PATH or NAME=PATH."""

    def build() -> Any:
        """The ASGI app: made in each replica."""
        from edgeformer.server import logs
        from edgeformer.server.app import create_app
        from edgeformer.server.registry import Registry

        logs.set_up()
        return create_app(Registry(bundles, options, {"threads": threads}), options)

    return serve.deployment(
        serve.ingress(build)(),
        name="edgeformer",
        num_replicas=replicas,
        # Beyond these the server itself would answer 429; Ray Serve then takes another replica, or waits.
        max_ongoing_requests=options.max_sequences + options.queue,
        ray_actor_options={"num_cpus": threads},
        graceful_shutdown_timeout_s=options.grace,
    ).bind()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of each replica, and CPUs that Ray keeps for it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--head-only", action="store_true", help="take requests on the head node alone")
    parser.add_argument("--address", help="of a Ray cluster; without one, this machine is the cluster")
    given = parser.parse_args()
    options = ServeOptions(host=given.host, port=given.port, preload=True)
    ray.init(address=given.address)
    where = "HeadOnly" if given.head_only else "EveryNode"
    serve.start(proxy_location=where, http_options={"host": given.host, "port": given.port})
    serve.run(application(given.bundles, options, given.replicas, given.threads), name="edgeformer", blocking=True)


if __name__ == "__main__":
    main()
