"""The on-disk format: read, check and refuse a bundle; write one atomically.

A bundle is a folder: an ordinary Hugging Face ONNX folder plus `edgeformer.json`, the manifest, which names every other
file with its size and SHA-256. Nothing in it is ever executed, and no path in it leads out of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeformer.context import config_number, context_length
from edgeformer.errors import BundleError
from edgeformer.manifest import FORMAT, FORMAT_VERSION, MANIFEST, Json, manifest_problems, read_json

if TYPE_CHECKING:
    import onnx

OLD = "-old"  # the end of the name that a replaced folder has for a moment


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

        `check="sizes"` validates the manifest, every file's size, and where the graph says that its weights lie: about
        0.1 s for any bundle when it is seen first. `check="hashes"` also reads every byte: SHA-256 of each file, scales
        that are NaN or infinite, and 8-bit weights of -128, which the format forbids.

        Raises:
            BundleError: with every problem found, one a line.
        """
        folder = _folder(path)
        manifest = read_json(folder / MANIFEST)
        problems = manifest_problems(manifest)
        if problems:
            raise _refusal(folder, problems)
        problems = _file_problems(folder, manifest["files"], check)
        if not problems:
            from edgeformer.weights import graph_problems

            for graph in manifest["graphs"].values():
                problems += graph_problems(folder, graph["file"], manifest["files"], values=check == "hashes")
        if problems:
            raise _refusal(folder, problems)
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
        from edgeformer.weights import read_model

        return read_model(self.graph_path(name))

    def file(self, name: str) -> Path | None:
        """The path of the file `name`, or None where the bundle has none."""
        return self.path / name if name in self.manifest["files"] else None

    @property
    def task(self) -> str:
        return str(self.manifest["task"])

    @property
    def vocab_size(self) -> int | None:
        """Token ids run from 0 to one less; None for a model without tokens."""
        for graph in self.manifest["graphs"].values():
            shape = graph["outputs"].get("logits", {}).get("shape", [])
            decodes = self.task == "text-generation" or any(name.startswith("past_key") for name in graph["inputs"])
            if decodes and "input_ids" in graph["inputs"] and len(shape) == 3 and isinstance(shape[2], int):
                return int(shape[2])
        return config_number(self.config, "vocab_size")

    def positions(self, graph: str = "model") -> int | None:
        """Tokens that fit the graph's tables of learned positions; None where it has none, or nobody looked."""
        value = self.manifest["graphs"].get(graph, {}).get("positions")
        return value if type(value) is int and value > 0 else None

    @property
    def context(self) -> int | None:
        """Positions that the model was made for: what its tables hold, else what config.json says; None: no limit."""
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
        """64 hex digits that change when any file's content does."""
        text = json.dumps({name: entry["sha256"] for name, entry in sorted(self.manifest["files"].items())})
        return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- write


@contextmanager
def write_bundle(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    The block fills the folder and calls `seal`. Then everything is fsynced, opened once more with `check="hashes"`, and
    renamed. On any exception the temporary folder is removed and `path` is as it was. After a kill or a power cut
    `path` is the old folder or the new one, whole; a leftover `.NAME.partial-*` is removed by the next write to the
    same path. (Replacing a folder is one atomic exchange on Linux; elsewhere two renames, with a moment between them
    in which `path` does not exist; the next write puts the old folder back.)

    Raises:
        BundleError: `path` exists and `overwrite` is false; or it is not a bundle, or holds files that are no part of
            one, which replacing it would lose; or what the block wrote is not a whole bundle.
        OSError: the disk refuses.
    """
    final = Path(os.path.realpath(path))  # a link to a folder stays a link
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(final)
    check_target(final, overwrite)
    temporary = final.parent / f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    os.mkdir(temporary)
    lock = _lock(temporary)
    try:
        yield temporary
        _fsync_tree(temporary)
        Bundle.open(temporary, check="hashes")
        check_target(final, overwrite)
        _put_in_place(temporary, final)
        _fsync(final.parent)
    finally:
        # What still has the temporary name is the failed attempt, or after an exchange the old bundle.
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def seal(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> Json:
    """Write `edgeformer.json` into `folder` and return its content: `manifest` with `files` filled in.

    `format` and `format_version` are filled in too where they are missing.

    Raises:
        BundleError: the manifest misses fields or has wrong ones (all in one message), or the folder holds something
            else than plain files.
    """
    folder = Path(folder)
    files: Json = {}
    problems = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == MANIFEST:
            continue
        if not entry.is_file(follow_symlinks=False):
            problems.append(f"{entry.name} is not a plain file: a bundle is one flat folder of files")
            continue
        files[entry.name] = {"size": entry.stat().st_size, "sha256": _sha256(folder / entry.name)}
    sealed: Json = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "files": files}
    problems += manifest_problems(sealed)
    try:
        text = json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        problems.append(f"{MANIFEST} cannot be written as JSON: {error}")
    if problems:
        raise _refusal(folder, problems)
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    _fsync(partial)
    os.replace(partial, folder / MANIFEST)
    sealed_again: Json = json.loads(text)
    return sealed_again


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuses at once what `write_bundle` would refuse at its end.

    Raises:
        BundleError: `path` exists and may not be replaced.
    """
    final = Path(os.path.realpath(path))
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise BundleError(f"{final} already exists; choose another name, remove it, or allow overwriting it.")
    if not final.is_dir():
        raise BundleError(f"{final} is a file, not a bundle folder; choose another name.")
    found = set(os.listdir(final))
    if not found:
        return
    if MANIFEST not in found:
        raise BundleError(f"{final} is a folder but not a bundle (no {MANIFEST}), so it is not replaced.")
    try:
        known = set(read_json(final / MANIFEST)["files"]) | {MANIFEST}
    except (BundleError, KeyError, TypeError) as error:
        raise BundleError(f"{final} has no readable {MANIFEST}, so it is not replaced; remove it yourself.") from error
    strangers = sorted(found - known)
    if strangers:
        raise BundleError(
            f"{final} holds files that are no part of its bundle and would be lost: {', '.join(strangers[:5])}"
            f"{', ...' if len(strangers) > 5 else ''}. Move them away first."
        )


def _put_in_place(temporary: Path, final: Path) -> None:
    if not os.path.lexists(final):
        os.rename(temporary, final)
        return
    if _exchange(temporary, final):
        return
    old = temporary.with_name(temporary.name + OLD)
    lock = _lock(final)
    try:
        os.rename(final, old)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (renameat2 with RENAME_EXCHANGE); False where the system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), swap)
    return done == 0


def _remove_leftovers(final: Path) -> None:
    """Clean up after killed writers; a folder whose writer lives is locked and stays."""
    prefix = f".{final.name}.partial-"
    for entry in os.scandir(final.parent):
        if not entry.name.startswith(prefix) or not entry.is_dir(follow_symlinks=False):
            continue
        lock = _lock(Path(entry.path))
        if lock is None:
            continue
        if entry.name.endswith(OLD) and not os.path.lexists(final):
            os.rename(entry.path, final)  # killed between two renames: this is the bundle
        else:
            shutil.rmtree(entry.path, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds `folder`'s lock until closed or the process dies; None where another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: leftovers stay until removed by hand
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _fsync_tree(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            _fsync(Path(entry.path))
    _fsync(folder)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no descriptor for a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------- read


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
            elif check == "hashes" and _sha256(path) != entry["sha256"]:
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refusal(folder: Path, problems: list[str]) -> BundleError:
    if len(problems) == 1:
        return BundleError(f"{folder}: {problems[0]}. Export or copy the bundle again.")
    shown = problems[:50]
    lines = "".join(f"\n  - {problem}" for problem in shown)
    more = f"\n  - and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return BundleError(f"{folder} has {len(problems)} problems:{lines}{more}\nExport or copy the bundle again.")
