"""The options of the native engine."""

from __future__ import annotations

from dataclasses import dataclass

from edgeformer.errors import InputError


@dataclass(frozen=True)
class NativeOptions:
    """How the native engine runs a graph.

    Attributes:
        isa: a kernel table by name; None: EDGEFORMER_ISA, else the best that this CPU runs.
        kv: the type of the KV cache: "int8" (one scale for each token and head), "float32", or "auto": int8 if weights
            are quantized, but float32 in the layers that the bundle names because int8 costs too much there; float32
            if weights are float, since int8 changes logits by about 0.5 % of their range.
        context: most tokens of a state; None: the bundle's context length, at most 4096.
        memory_limit: bytes that weights, one state at full context and working memory may take together.
        use_disk_cache: read and write the lowered program and the packed weights in the disk cache.
        float32_layers: caches that stay float32 if the others are int8, counted from 0; None: with kv="auto" those that
            the bundle names, else none. The export tries some.

    Raises:
        InputError: an option is of another type.
    """

    isa: str | None = None
    kv: str = "auto"
    context: int | None = None
    memory_limit: int | None = None
    use_disk_cache: bool = True
    float32_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("context", "memory_limit"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputError(f"{name} is {value!r}, expected a whole number.")
        if self.isa is not None and not isinstance(self.isa, str):
            raise InputError(f"isa is {self.isa!r}, expected the name of a kernel table.")
