"""Answers thousands of prompts on a Ray cluster: one model a node, which uses all threads that it is given.

    python examples/ray_batch.py BUNDLE PROMPTS -o FOLDER --threads 4 --max-new-tokens 64

PROMPTS is a JSONL or Parquet file: each row has a `prompt` (a text, or a list of chat messages) and may have an `id`
(else it is the number of the row). The answers are JSON lines in FOLDER, one file a block. A run that was stopped is
started again with the same command: rows whose answers are there are left out. A node that fails is replaced by
another, and its block runs again.

BUNDLE must be there on each node, under the same path. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray


class Answers:
    """An actor: the model of one node."""

    def __init__(self, bundle: str, threads: int, arguments: dict[str, Any]) -> None:
        import edgeformer

        self._model = edgeformer.load(bundle, threads=threads)
        self._arguments = arguments

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The answers to a block of rows (`id`, `prompt` as JSON), as JSON lines; the model takes several at once."""
        prompts = [json.loads(text) for text in block["prompt"]]
        lines = [""] * len(prompts)
        for ended in self._model.generate_each(prompts, **self._arguments):
            row: dict[str, Any] = {"id": json.loads(block["id"][ended.index])}
            if ended.error is None:
                result = ended.results[0]
                row |= {"answer": result.text, "finish_reason": result.finish_reason, "tokens": len(result.ids)}
            else:
                row |= {"error": str(ended.error)}
            lines[ended.index] = json.dumps(row, ensure_ascii=False)
        return {"line": np.array(lines, object)}


def read_rows(path: Path) -> Iterator[tuple[Any, Any]]:
    """(id, prompt) of each row."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows):
        yield row.get("id", number), row["prompt"]


def answered(folder: Path) -> set[str]:
    """The ids, as JSON, of rows whose answers are in `folder`. A file has its name once it is whole."""
    found = (line for part in folder.glob("part-*.jsonl") for line in part.read_text().splitlines())
    return {json.dumps(json.loads(line)["id"]) for line in found}


def write_part(folder: Path, lines: list[str]) -> None:
    """Writes a file that is there as a whole or not at all."""
    name = f"{uuid.uuid4().hex}.jsonl"
    with open(folder / f"unfinished-{name}", "w") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / f"unfinished-{name}", folder / f"part-{name}")


def nodes_for(threads: int) -> int:
    """How many nodes of the cluster have so many CPUs: each gets one actor."""
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) >= threads for node in ray.nodes())


def run(options: argparse.Namespace) -> int:
    """Answers what is not answered yet; returns how many rows that were."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    done = answered(folder)
    rows = [{"id": json.dumps(one), "prompt": json.dumps(prompt)} for one, prompt in read_rows(options.prompts)]
    rows = [row for row in rows if row["id"] not in done]
    print(f"{len(done)} answered before, {len(rows)} to do", flush=True)
    if not rows:
        return 0
    nodes = nodes_for(options.threads)
    if nodes == 0:
        raise SystemExit(f"No node of the cluster has {options.threads} CPUs; give fewer --threads.")
    # The rows are in the cluster's memory before an actor holds all CPUs, so no other task waits for a CPU.
    data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // options.block))
    data = data.map_batches(
        Answers,
        fn_constructor_args=[
            str(options.bundle.resolve()),
            options.threads,
            {"max_new_tokens": options.max_new_tokens},
        ],
        batch_size=None,  # a block at a time
        num_cpus=options.threads,  # threads and CPUs agree: two models on one node would slow each other down
        compute=ray.data.ActorPoolStrategy(size=nodes),
    )
    count = 0
    for block in data.iter_batches(batch_size=None, prefetch_batches=0):
        write_part(folder, list(block["line"]))
        count += len(block["line"])
        print(f"{len(done) + count} of {len(done) + len(rows)}", flush=True)
    return count


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2, help="of each model, and CPUs that Ray keeps for it")
    parser.add_argument("--block", type=int, default=256, help="rows that one actor takes at once")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--address", help="of a Ray cluster; without one, this machine is the cluster")
    options = parser.parse_args()
    ray.init(address=options.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    run(options)


if __name__ == "__main__":
    main()
