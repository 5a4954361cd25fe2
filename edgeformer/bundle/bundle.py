"""Opens a bundle and checks it.

A bundle is an ordinary Hugging Face ONNX folder plus `edgeformer.json`, the manifest, which lists every other file with
its size and SHA-256. No code in a bundle is executed, and no path in it may point outside the folder.
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
from edgeformer.bundle.hashes import bundle_error, hash_problems
from edgeformer.bundle.manifest import MANIFEST, Json, manifest_problems, read_json
from edgeformer.errors import BundleError, InputError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Bundle:
    """An opened and checked bundle; immutable. Create it with `Bundle.open`."""

    path: Path
    manifest: Json
    config: Json
    generation_config: Json

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        check: Literal["sizes", "hashes"] = "sizes",
        *,
        public_key: bytes | None = None,
    ) -> Bundle:
        """The bundle at `path`, checked.

        `check="sizes"` checks the manifest, the size of every file, and the offsets of the weights in each graph; the
        first time this takes about 0.1 s. `check="hashes"` also reads every byte: the SHA-256 of each file must match,
        quantization scales must be finite, and 8-bit weights must not be -128.

        `public_key` (32 bytes, Ed25519): the bundle must be signed with its private half, see
        `edgeformer.bundle.signing`; all hashes are checked too.

        Raises:
            BundleError: the bundle is missing or has problems; the message lists all of them, one per line. Or it is
                not signed with that key.
        """
        folder = _folder(path)
        if public_key is not None:
            from edgeformer.bundle.ed25519 import check_signature

            check_signature(folder, public_key)
        manifest = read_json(folder / MANIFEST)
        problems = manifest_problems(manifest)
        if problems:
            raise bundle_error(folder, problems)
        problems = _file_problems(folder, manifest["files"])
        if not problems and (check == "hashes" or public_key is not None):
            problems = hash_problems(folder, manifest["files"])
        if not problems:
            from edgeformer.bundle.check import graph_problems

            for graph in manifest["graphs"].values():
                problems += graph_problems(folder, graph, manifest["files"], values=check == "hashes")
        if problems:
            raise bundle_error(folder, problems)
        texts = {}
        for name in ("config.json", "generation_config.json"):
            texts[name] = read_json(folder / name) if name in manifest["files"] else {}
        return cls(folder, manifest, texts["config.json"], texts["generation_config.json"])

    def graph_path(self, name: str = "model") -> Path:
        """The path of the ONNX file of the graph `name`.

        Raises:
            BundleError: the bundle has no such graph.
        """
        graphs = self.manifest["graphs"]
        if name not in graphs:
            raise BundleError(f"{self.path} has no graph {name!r}; it has {', '.join(sorted(graphs))}.")
        return self.path / str(graphs[name]["file"])

    def read_graph(self, name: str = "model") -> onnx.ModelProto:
        """The parsed graph, without the weights in the external data file.

        Raises:
            BundleError: the bundle has no such graph, or the file is not an ONNX model.
        """
        from edgeformer.bundle.check import read_model

        return read_model(self.graph_path(name))

    def file(self, name: str) -> Path | None:
        """The path of the file `name`; None if the manifest does not list it."""
        return self.path / name if name in self.manifest["files"] else None

    @property
    def task(self) -> str:
        """The task, usually by its Hugging Face name (`text-generation`, `text-classification`, ...)."""
        return str(self.manifest["task"])

    @property
    def vocab_size(self) -> int | None:
        """The number of token ids; None for a model that takes and gives no tokens."""
        for graph in self.manifest["graphs"].values():
            shape = graph["outputs"].get("logits", {}).get("shape", [])
            decodes = self.task == "text-generation" or any(name.startswith("past_key") for name in graph["inputs"])
            if decodes and "input_ids" in graph["inputs"] and len(shape) == 3 and isinstance(shape[2], int):
                return int(shape[2])
        return config_number(self.config, "vocab_size")

    def positions(self, graph: str = "model") -> int | None:
        """The rows of the graph's table of position embeddings, in tokens; None if the manifest gives none."""
        value = self.manifest["graphs"].get(graph, {}).get("positions")
        return value if type(value) is int and value > 0 else None

    @property
    def context(self) -> int | None:
        """The context length in tokens, from the position table, else from config.json; None for no limit."""
        return self.positions("decoder") or self.positions() or context_length(self.config)

    def context_source(self, graph: str = "model") -> str:
        """The origin of `context`, as a phrase for messages."""
        learned = self.positions(graph) is not None
        return "the size of its position table" if learned else "max_position_embeddings in config.json"

    @property
    def size(self) -> int:
        """The bytes of all files that the manifest lists."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all files, as 64 hex digits."""
        text = json.dumps({name: entry["sha256"] for name, entry in sorted(self.manifest["files"].items())})
        return hashlib.sha256(text.encode()).hexdigest()


def _folder(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"The path of a bundle is {path!r}, expected a str or a path.")
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


def _file_problems(folder: Path, files: Json) -> list[str]:
    problems = []
    for name, entry in files.items():
        path = folder / name
        try:
            info = os.stat(path)  # follows links: the Hugging Face cache consists of links
            if not stat.S_ISREG(info.st_mode):
                problems.append(f"{name} is not a plain file")
            elif info.st_size != entry["size"]:
                fault = "the copy is cut short" if info.st_size < entry["size"] else "the file was changed"
                if _is_lfs_pointer(path, info.st_size):
                    fault = "it is a Git LFS pointer, not the file itself (run `git lfs pull`)"
                problems.append(f"{name} holds {info.st_size:,} bytes, {MANIFEST} says {entry['size']:,}: {fault}")
            elif outside := _outside(folder, path):
                problems.append(f"{name} is a link to {outside}, which is outside of the folder; copy the file itself")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def _outside(folder: Path, path: Path) -> str:
    """Where a file really lies, if that is outside of the folder; "" inside, and in a Hugging Face cache.

    Such a cache has `snapshots/REVISION/NAME` as a link to `../../blobs/HASH`. Any other link that leaves the folder is
    refused: a bundle could give out the content of files of this machine.
    """
    if not path.is_symlink():
        return ""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    caches = [parent.parent / "blobs" for parent in (home, *home.parents) if parent.name == "snapshots"]
    return "" if real.is_relative_to(home) or any(real.is_relative_to(blobs) for blobs in caches) else str(real)


def _is_lfs_pointer(path: Path, size: int) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return size < 1024 and file.read(40).startswith(b"version https://git-lfs")
    return False
