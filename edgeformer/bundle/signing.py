"""Signs a bundle, and checks its signature with a key that the app pins. Needs the package `cryptography`.

The file `edgeformer.sig` is the Ed25519 signature (RFC 8032, 64 bytes) of the bytes of `edgeformer.json`, after a
prefix that no other protocol uses. The manifest has the size and SHA-256 of every other file, so the signature covers
them all. Who may sign is not in the bundle: the app has the public key (32 bytes) in its own code.

    python -m edgeformer.bundle.signing key private.pem          makes a key pair; prints the public key as hex
    python -m edgeformer.bundle.signing sign BUNDLE private.pem  writes BUNDLE/edgeformer.sig
    python -m edgeformer.bundle.signing check BUNDLE HEX
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.ed25519 import PREFIX, SIGNATURE, cryptography
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.files import replace_file


def make_key(path: str | os.PathLike[str]) -> bytes:
    """Writes a new private key to `path` (PEM, PKCS 8, readable by its owner only); the public key, 32 bytes.

    Raises:
        InputError: the file exists.
    """
    ed25519, serialization = cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{path} exists; a key is not overwritten. Choose another name.") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    public: bytes = key.public_key().public_bytes_raw()
    return public


def sign_bundle(path: str | os.PathLike[str], private_key: bytes) -> None:
    """Signs the bundle at `path`, after a check of all its hashes. `private_key`: 32 bytes, or a PEM text.

    Raises:
        BundleError: the bundle is damaged.
        InputError: `private_key` is no Ed25519 key.
    """
    ed25519, serialization = cryptography()
    try:
        if len(private_key) == 32:
            key = ed25519.Ed25519PrivateKey.from_private_bytes(private_key)
        else:
            key = serialization.load_pem_private_key(private_key, None)
    except (TypeError, ValueError) as error:
        raise InputError(f"The private key cannot be read: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"The private key is of {type(key).__name__}, expected Ed25519.")
    bundle = Bundle.open(path, check="hashes")
    replace_file(bundle.path / SIGNATURE, key.sign(PREFIX + (bundle.path / MANIFEST).read_bytes()))


def main(arguments: list[str]) -> int:
    """The command of the module's docstring."""
    try:
        match arguments:
            case ["key", path]:
                print(make_key(path).hex())
            case ["sign", bundle, path]:
                sign_bundle(bundle, Path(path).read_bytes())
            case ["check", bundle, key]:
                Bundle.open(bundle, public_key=bytes.fromhex(key))
                print(f"{bundle}: the signature and all hashes are right")
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (EdgeformerError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
