"""The on-disk format: read, check and refuse a bundle; write one atomically.

A bundle is a folder: an ordinary Hugging Face ONNX folder plus `edgeformer.json`, the manifest, which names every other
file with its size and SHA-256. Nothing in it is ever executed, and no path in it leads out of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeformer.bundle.context import config_number, context_length
from edgeformer.bundle.manifest import MANIFEST, Json, manifest_problems, read_json
from edgeformer.errors import BundleError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. Made by `Bundle.open`; immutable."""

    path: Path
    manifest: Json
    config: Json
    generation_config: Json

    @classmethod
    def open(cls, path: str | os.PathLike[str], check: Literal["sizes", "hashes"] = "sizes") -> Bundle:
        """The bundle at `path`, after checking it.

        `check="sizes"` validates the manifest, every file's size, and the offsets of weights in the graph: about
        0.1 s for any bundle at its first opening. `check="hashes"` also reads every byte: SHA-256 of each file, scales
        that are NaN or infinite, and 8-bit weights of -128, which the format forbids.

        Raises:
            BundleError: with every problem found, one a line.
        """
        folder = _folder(path)
        manifest = read_json(folder / MANIFEST)
        problems = manifest_problems(manifest)
        if problems:
            raise refusal(folder, problems)
        problems = _file_problems(folder, manifest["files"], check)
        if not problems:
            from edgeformer.bundle.check import graph_problems

            for graph in manifest["graphs"].values():
                problems += graph_problems(folder, graph["file"], manifest["files"], values=check == "hashes")
        if problems:
            raise refusal(folder, problems)
        texts = {}
        for name in ("config.json", "generation_config.json"):
            texts[name] = read_json(folder / name) if name in manifest["files"] else {}
        return cls(folder, manifest, texts["config.json"], texts["generation_config.json"])

    def graph_path(self, name: str = "model") -> Path:
        """Where the graph `name` lies.

        Raises:
            BundleError: the bundle has no such graph.
        """
        graphs = self.manifest["graphs"]
        if name not in graphs:
            raise BundleError(f"{self.path} has no graph {name!r}; it has {', '.join(sorted(graphs))}.")
        return self.path / str(graphs[name]["file"])

    def read_graph(self, name: str = "model") -> onnx.ModelProto:
        """The parsed graph; weights in the external data file are not loaded."""
        from edgeformer.bundle.check import read_model

        return read_model(self.graph_path(name))

    def file(self, name: str) -> Path | None:
        """The path of the file `name`, or None where the bundle has none."""
        return self.path / name if name in self.manifest["files"] else None

    @property
    def task(self) -> str:
        """The name of the task: text-generation, text-classification, ..., or another word."""
        return str(self.manifest["task"])

    @property
    def vocab_size(self) -> int | None:
        """The number of token ids; None for a model without tokens."""
        for graph in self.manifest["graphs"].values():
            shape = graph["outputs"].get("logits", {}).get("shape", [])
            decodes = self.task == "text-generation" or any(name.startswith("past_key") for name in graph["inputs"])
            if decodes and "input_ids" in graph["inputs"] and len(shape) == 3 and isinstance(shape[2], int):
                return int(shape[2])
        return config_number(self.config, "vocab_size")

    def positions(self, graph: str = "model") -> int | None:
        """Tokens that fit the graph's tables of learned positions; None where it has none or none were looked for."""
        value = self.manifest["graphs"].get(graph, {}).get("positions")
        return value if type(value) is int and value > 0 else None

    @property
    def context(self) -> int | None:
        """The context length: the size of the tables of positions, else what config.json says; None for no limit."""
        return self.positions("decoder") or self.positions() or context_length(self.config)

    def context_source(self, graph: str = "model") -> str:
        """Where `context` comes from, for messages."""
        learned = self.positions(graph) is not None
        return "what its table of positions holds" if learned else "max_position_embeddings in config.json"

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    @property
    def fingerprint(self) -> str:
        """64 hex digits that change with the content of any file: the one fingerprint of a model."""
        text = json.dumps({name: entry["sha256"] for name, entry in sorted(self.manifest["files"].items())})
        return hashlib.sha256(text.encode()).hexdigest()


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise BundleError(f"{folder} does not exist; a bundle is a folder made by `edgeformer export`.")
    if not folder.is_dir():
        what = "a GGUF file" if folder.suffix == ".gguf" else "a file"
        raise BundleError(f"{folder} is {what}, expected a bundle folder; make one with `edgeformer export`.")
    if not (folder / MANIFEST).exists():
        onnx_inside = any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx"))
        if onnx_inside:
            what = "holds ONNX files but is not an edgeformer bundle"
        elif (folder / "config.json").exists():
            what = "is a model folder that was not exported yet"
        else:
            what = "is not an edgeformer bundle"
        raise BundleError(f"{folder} {what}: it has no {MANIFEST}. Make a bundle with `edgeformer export`.")
    return folder


def _file_problems(folder: Path, files: Json, check: str) -> list[str]:
    problems = []
    for name, entry in files.items():
        path = folder / name
        try:
            info = os.stat(path)  # follows links: a Hugging Face cache folder is made of them
            if not stat.S_ISREG(info.st_mode):
                problems.append(f"{name} is not a plain file")
            elif info.st_size != entry["size"]:
                fault = "the copy is cut short" if info.st_size < entry["size"] else "the file was changed"
                if _is_lfs_pointer(path, info.st_size):
                    fault = "it is a Git LFS pointer, not the file itself (run `git lfs pull`)"
                problems.append(f"{name} holds {info.st_size:,} bytes, {MANIFEST} says {entry['size']:,}: {fault}")
            elif check == "hashes" and sha256(path) != entry["sha256"]:
                problems.append(f"{name} has the right size but other content than when it was exported (SHA-256)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def _is_lfs_pointer(path: Path, size: int) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return size < 1024 and file.read(40).startswith(b"version https://git-lfs")
    return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refusal(folder: Path, problems: list[str]) -> BundleError:
    """One error that lists all problems of a bundle."""
    if len(problems) == 1:
        return BundleError(f"{folder}: {problems[0]}. Export or copy the bundle again.")
    shown = problems[:50]
    lines = "".join(f"\n  - {problem}" for problem in shown)
    more = f"\n  - and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return BundleError(f"{folder} has {len(problems)} problems:{lines}{more}\nExport or copy the bundle again.")
