"""SmolLM2's GGUF with all matrices in Q8_0: the file that llama-server gets.

The gguf package rounds as llama.cpp's own quantizer does, so no llama.cpp has to be built for it.
"""

from __future__ import annotations

from pathlib import Path

from bench.peers import models
from bench.smollm2 import gguf_path

FILE_TYPE, MOSTLY_Q8_0 = "general.file_type", 7  # llama.h's LLAMA_FTYPE_MOSTLY_Q8_0


def q8_0() -> Path:
    """The file that `bench.peers` has llama.cpp's quantizer make, at the same place."""

    def make(path: Path) -> None:
        write_q8_0(gguf_path(), path)

    return models.write_whole(models.OUT / "llama.cpp" / "Q8_0.gguf", make)


def write_q8_0(source: Path, path: Path) -> None:
    """Writes `source` again: quantized matrices as Q8_0, what is in float as it is."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        value = MOSTLY_Q8_0 if name == FILE_TYPE else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if kind.name not in ("F32", "F16", "Q8_0"):
            kind, data = q8, gguf.quants.quantize(gguf.quants.dequantize(data, kind), q8)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
