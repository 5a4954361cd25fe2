"""The signature of a bundle, checked with a public key; `edgeformer.bundle.signing` says what is signed, and signs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeformer.bundle.manifest import MANIFEST, MAX_JSON
from edgeformer.errors import BundleError, EdgeformerError, InputError, pip_install

SIGNATURE = "edgeformer.sig"  # it signs the manifest, so the manifest does not list it
PREFIX = b"edgeformer bundle v1\0"
_LENGTH = 64  # bytes of an Ed25519 signature


def check_signature(folder: Path, public_key: bytes) -> None:
    """
    Raises:
        BundleError: the bundle has no signature, or not one of this key for its manifest.
        InputError: `public_key` is no Ed25519 key.
    """
    ed25519, _ = cryptography()
    from cryptography.exceptions import InvalidSignature

    if not isinstance(public_key, bytes) or len(public_key) != 32:
        size = len(public_key) if isinstance(public_key, bytes) else type(public_key).__name__
        raise InputError(f"public_key is {size} bytes, expected 32: the raw Ed25519 key.")
    try:
        signature = _read(folder / SIGNATURE, _LENGTH)
        manifest = _read(folder / MANIFEST, MAX_JSON)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not signed: it has no {Path(error.filename).name}.") from error
    except OSError as error:
        raise BundleError(f"{error.filename} cannot be read: {error.strerror}.") from error
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, PREFIX + manifest)
    except InvalidSignature:
        raise BundleError(
            f"{folder / SIGNATURE} is not a signature of {MANIFEST} by the key {public_key.hex()[:16]}...: the bundle "
            "was changed after it was signed, or somebody else signed it. Do not use it."
        ) from None


def _read(path: Path, most: int) -> bytes:
    """The content of a plain file, at most `most` + 1 bytes: of /dev/zero and the like nothing is read."""
    if path.exists() and not path.is_file():
        raise BundleError(f"{path} is not a plain file.")
    with open(path, "rb") as file:
        return file.read(most + 1)


def cryptography() -> tuple[Any, Any]:
    """The modules (ed25519, serialization) of that package.

    Raises:
        EdgeformerError: it is not installed.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise EdgeformerError(f"Signatures need the package cryptography: {pip_install('cryptography')}") from error
    return ed25519, serialization
