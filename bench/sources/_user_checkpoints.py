"""Checkpoints of a user-defined module, as training loops write them, and broken ones."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.sources._hub_checkpoints import Code, Situation, State

SPEC = ("x=float32[batch,sequence,8]",)
# The factory's weights differ from the checkpoint's, so a missing tensor is detected.
SOURCE = """
import torch
from torch import nn


class M(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 16)
        self.register_buffer("table", torch.ones(16), persistent=False)

    def forward(self, x):
        x = self.norm(self.a(x).relu().mT).mT * self.table
        return self.head(self.b(x))


class Tied(M):
    def __init__(self):
        super().__init__()
        self.head.weight = self.b.weight


def make():
    return M()


def tied():
    return Tied()


def half():
    return M().half()


def compiled():
    return torch.compile(M())


def parallel():
    return nn.DataParallel(M())


def partly():
    module = M()
    module.b = torch.compile(module.b)
    return module
"""


def module(name: str = "make", seed: int = 2) -> torch.nn.Module:
    """The module with other values than the factory's, in buffers too."""
    scope: dict[str, Any] = {"__name__": "own"}
    exec(compile(SOURCE, "own.py", "exec"), scope)
    made: torch.nn.Module = scope[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.norm.running_mean.copy_(torch.randn(16, generator=generator))  # type: ignore[operator,union-attr]
        made.norm.running_var.copy_(torch.rand(16, generator=generator) + 0.5)  # type: ignore[operator,union-attr]
    return made.eval()


def state(name: str = "make", seed: int = 2) -> State:
    return dict(module(name, seed).state_dict())


def prefixed(prefix: str, found: State) -> State:
    return {prefix + name: value.clone() for name, value in found.items()}


Write = Callable[[Path], Path]


def torch_save(make: Callable[[], Any], name: str = "w.pt") -> Write:
    def write(folder: Path) -> Path:
        torch.save(make(), folder / name)
        return folder / name

    return write


def safetensors(make: Callable[[], State]) -> Write:
    def write(folder: Path) -> Path:
        save_file({name: value.clone() for name, value in make().items()}, folder / "w.safetensors")
        return folder / "w.safetensors"

    return write


def shards(as_folder: bool, keep: int = 2) -> Write:
    def write(folder: Path) -> Path:
        names, place = sorted(state()), folder / "sharded"
        place.mkdir()
        parts = [names[::2], names[1::2]]
        for number, part in enumerate(parts[:keep]):
            save_file({name: state()[name] for name in part}, place / f"m-{number}.safetensors")
        weight_map = {name: f"m-{number}.safetensors" for number, part in enumerate(parts) for name in part}
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return place if as_folder else place / "model.safetensors.index.json"

    return write


def cut(write: Write) -> Write:
    def cut_short(folder: Path) -> Path:
        path = write(folder)
        path.write_bytes(path.read_bytes()[:-50])
        return path

    return cut_short


def packed(folder: Path) -> Path:
    """A zip with compressed records: small on disk, large in memory."""
    path = torch_save(lambda: {"a": torch.zeros(100_000)})(folder)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def lightning() -> dict[str, Any]:
    found = prefixed("model.", state())
    return {"state_dict": found, "epoch": 3, "global_step": 7, "optimizer_states": [{"state": {0: {"step": 1}}}],
            "hyper_parameters": {"rate": 0.1}, "pytorch-lightning_version": "2.5.0"}  # fmt: skip


def adamw() -> dict[str, Any]:
    made = module()
    optimizer = torch.optim.AdamW(made.parameters())
    made(torch.ones(2, 3, 8)).sum().backward()
    optimizer.step()
    return {"model": state(), "optimizer": optimizer.state_dict(), "iter_num": 5, "rng": torch.get_rng_state()}


def scripted(folder: Path) -> Path:
    torch.jit.trace(module(), torch.ones(2, 3, 8)).save(str(folder / "w.pt"))
    return folder / "w.pt"


def distributed(folder: Path) -> Path:
    import torch.distributed.checkpoint as checkpoint

    checkpoint.save(state(), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def _case(
    name: str, write: Write, words: tuple[str, ...] = (), *, right: str | None = "make", factory: str = "make",
    model: Callable[[], torch.nn.Module] | None = None, **options: Any,
) -> Situation:  # fmt: skip
    def make(work: Path) -> str:
        (work / "own.py").write_text(SOURCE)
        return f"{work / 'own.py'}:{factory}"

    made = model or ((lambda: module(right)) if right else None)
    return Situation(name, make, made, words, {"weights": write, "input": SPEC, **options})


def situations() -> Iterator[Situation]:
    """Every situation of `--weights`; the option's value is the function that writes the file."""
    yield _case("weights .safetensors", safetensors(state))
    yield _case("weights .pt", torch_save(state))
    yield _case("weights of an index", shards(as_folder=False))
    yield _case("weights of a folder of shards", shards(as_folder=True))
    for dtype in (torch.float16, torch.bfloat16):
        low = lambda d=dtype: {n: v.to(d) if v.is_floating_point() else v for n, v in state().items()}  # type: ignore[misc]  # noqa: E731
        rounded = lambda d=dtype: _round(module(), d)  # type: ignore[misc]  # noqa: E731
        yield _case(f"weights of {str(dtype).removeprefix('torch.')}", safetensors(low), model=rounded)
    yield _case("float32 weights, a factory in float16", safetensors(state), factory="half")
    for prefix in (
        "_orig_mod.",
        "module.",
        "model.",
        "net.",
        "module._orig_mod.",
        "_fsdp_wrapped_module.",
        "model._orig_mod.",
    ):
        wrapped = lambda p=prefix: prefixed(p, state())  # type: ignore[misc]  # noqa: E731
        yield _case(f"weights with prefix {prefix}", safetensors(wrapped), (prefix.split(".")[0], "stripped"))
    inside = lambda: {n.replace("b.", "b._orig_mod."): v for n, v in state().items()}  # noqa: E731
    yield _case("weights with _orig_mod. inside", safetensors(inside), ("_orig_mod.", "stripped"))
    for key in ("state_dict", "model_state_dict", "model", "module", "ema", "net"):
        nested = lambda k=key: {k: state(), "epoch": 3}  # type: ignore[misc]  # noqa: E731
        yield _case(f"weights in ['{key}']", torch_save(nested), (f"['{key}']",))
    yield _case("weights two dictionaries deep", torch_save(lambda: {"c": {"model": state()}}), ("['c']['model']",))
    yield _case("weights of Lightning", torch_save(lightning, "w.ckpt"), ("['state_dict']", "'model.' stripped"))
    yield _case("weights beside AdamW's state", torch_save(adamw), ("['model']",))
    yield _case("weights beside plain values", torch_save(lambda: {**state(), "epoch": 3}))
    two = torch_save(lambda: {"model": state(), "ema": state(seed=3)})
    yield _case("weights and their average", two, ("2 state_dicts that fit", "['model']", "['ema']"), right=None)
    one = torch_save(lambda: {"generator": state(), "critic": {"w": torch.ones(3)}})
    yield _case("weights of two models, one fits", one, ("['generator']",))
    none = torch_save(lambda: {"generator": {"v": torch.ones(3)}, "critic": {"w": torch.ones(3)}})
    yield _case("weights of two models, none fits", none, ("['generator']", "['critic']"), right=None)

    once = lambda: {n: v for n, v in state("tied").items() if n != "head.weight"}  # noqa: E731
    yield _case("weights tied, stored once", safetensors(once), ("head.weight",), right="tied", factory="tied")
    yield _case("weights tied, stored twice", torch_save(lambda: state("tied")), right="tied", factory="tied")
    both = lambda: {"_orig_mod." + n: v for n, v in once().items()}  # noqa: E731
    yield _case("weights tied, stored once, with a prefix", safetensors(both), right="tied", factory="tied")
    yield _case(
        "weights tied, of other values", safetensors(state), ("one tensor in the module",), right=None, factory="tied"
    )

    lacking = lambda: {n: v for n, v in state().items() if "head" not in n}  # noqa: E731
    yield _case("weights without a head", safetensors(lacking), ("head.bias", "--allow-missing 'head.*'"), right=None)
    yield _case("weights without a head, allowed", safetensors(lacking), ("head.bias",), allow_missing=("head.*",))
    buffers = lambda: {n: v for n, v in state().items() if "running" not in n}  # noqa: E731
    yield _case("weights without buffers", safetensors(buffers), ("norm.running_mean",), right=None)
    more = lambda: {**state(), "loss.weight": torch.ones(3)}  # noqa: E731
    yield _case("weights with one too many", safetensors(more), ("loss.weight", "not used"), right=None)
    teacher = lambda: {**prefixed("model.", state()), "loss.weight": torch.ones(3)}  # noqa: E731
    yield _case("weights with a prefix and one too many", safetensors(teacher), ("loss.weight", "1 tensor"), right=None)
    average = lambda: prefixed("model.", state()) | prefixed("ema.", state(seed=3))  # noqa: E731
    yield _case("weights of two prefixes", safetensors(average), ("'model.'", "'ema.'"), right=None)
    yield _case(
        "weights with a prefix and one too many, allowed", safetensors(teacher), ("loss.weight", "stripped"),
        allow_missing=("loss.*",),
    )  # fmt: skip
    wide = lambda: {**state(), "head.bias": torch.ones(17)}  # noqa: E731
    yield _case("weights of another shape", safetensors(wide), ("head.bias is (17,), expected (16,)",), right=None)
    ints = lambda: {**state(), "head.weight": torch.ones(16, 16, dtype=torch.int8)}  # noqa: E731
    yield _case("weights of int8", safetensors(ints), ("head.weight", "int8", "scale"), right=None)
    nan = lambda: {**state(), "head.bias": torch.full((16,), float("nan"))}  # noqa: E731
    yield _case("weights with NaN", safetensors(nan), ("head.bias has 16 of 16",), right=None)
    mean = lambda: {**state(), "norm.running_var": torch.full((16,), float("nan"))}  # noqa: E731
    yield _case("weights with NaN in a buffer", safetensors(mean), ("norm.running_var",), right=None)

    yield _case("weights cut short", cut(safetensors(state)), ("w.safetensors", "cut short"), right=None)
    yield _case("weights cut short, .pt", cut(torch_save(state)), ("w.pt", "cut short"), right=None)
    yield _case("weights without a shard", shards(True, keep=1), ("m-1.safetensors", "missing"), right=None)
    yield _case("weights of no file", lambda folder: folder / "none.pt", ("none.pt",), right=None)
    yield _case(
        "weights of a whole module", torch_save(lambda: torch.nn.Linear(8, 16)), ("Linear", ".state_dict()"), right=None
    )
    code = torch_save(lambda: {"state_dict": state(), "x": Code()}, "w.ckpt")
    yield _case("weights beside code", code, ("Code", "['state_dict']"), right=None)
    space = torch_save(lambda: {"state_dict": state(), "args": argparse.Namespace(a=1)}, "w.ckpt")
    yield _case("weights beside arguments", space, ("Namespace", "weights_only=False"), right=None)
    yield _case("weights of TorchScript", scripted, ("TorchScript", "torch.jit.load"), right=None)
    yield _case("weights of a distributed checkpoint", distributed, ("dcp_to_torch_save",), right=None)
    old = lambda folder: _legacy(folder)  # noqa: E731
    yield _case("weights of an old torch.save", old, ("1.6", "weights_only=True"), right=None)
    yield _case("weights compressed", packed, ("compressed",), right=None)
    yield _case("weights of no tensors", torch_save(lambda: {"epoch": 3}), ("no state_dict",), right=None)
    for factory in ("compiled", "parallel", "partly"):
        yield _case(f"a {factory} module", safetensors(state), ("taken out of",), factory=factory)


def _legacy(folder: Path) -> Path:
    torch.save(state(), folder / "w.pt", _use_new_zipfile_serialization=False)
    return folder / "w.pt"


def _round(made: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return made.to(dtype).float()
