"""Which command runs a bundle, and the message of the others."""

from __future__ import annotations

from pathlib import Path

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, PAST, PRESENT
from edgeformer.errors import InputError
from edgeformer.tasks.embedding import HIDDEN_STATES, VECTORS

LABELLED = ("text-classification", "image-classification", "token-classification")


def command_for(bundle: Bundle, name: str | None = None) -> str:
    """The command that runs it, with its arguments: `run NAME "text"`, `embed NAME "text"`, ...

    Without a tokenizer a text is token ids. `name` of the bundle is its folder's name unless given.
    """
    name, graphs = name or bundle.path.name, bundle.manifest["graphs"]
    text = '"text"' if bundle.file("tokenizer.json") is not None else "--ids 1,2,3"
    if "encoder" in graphs:
        return f"run {name} {text}" if IDS in graphs["encoder"]["inputs"] else f"transcribe {name} speech.wav"
    inputs, outputs = graphs["model"]["inputs"], graphs["model"]["outputs"]
    if bundle.task == "text-generation":
        return f"run {name} {text}"
    item = '"text"' if IDS in inputs else "picture.png" if "pixel_values" in inputs else ""
    if item and bundle.task in LABELLED:
        return f"classify {name} {item}"
    if item and any(output in outputs for output in (HIDDEN_STATES, *VECTORS)):
        return f"embed {name} {item}"
    return f"run {name} --inputs arrays.npz"


def require(path: Path, command: str) -> Bundle:
    """The bundle, if `command` (run, embed, classify, transcribe) is for it.

    Raises:
        InputError: it is for something else; the message says what the bundle is and which command runs it.
        BundleError: it is damaged, or none.
    """
    bundle = Bundle.open(path)
    right = command_for(bundle, str(path))
    if command != right.split()[0] or "--inputs" in right:
        graphs = bundle.manifest["graphs"]
        ports = graphs.get("model") or {"inputs": graphs["encoder"]["inputs"], "outputs": {"logits": ()}}
        taken, given = (
            ", ".join(name for name in ports[side] if not name.startswith((PAST, PRESENT)))
            for side in ("inputs", "outputs")
        )
        raise InputError(
            f"{path} is a {bundle.task} model ({taken} -> {given}), so `edgeformer {command}` is not for it. "
            f"Run it with: edgeformer {right}"
        )
    return bundle
