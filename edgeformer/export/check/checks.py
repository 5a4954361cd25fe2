"""The checks of a model, whatever graphs it has: chosen once, by the kind of its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from edgeformer.bundle.signature import F32
from edgeformer.errors import ParityError
from edgeformer.export.check.encoder_decoder import EncoderDecoderChecks
from edgeformer.export.check.one_graph import OneGraphChecks
from edgeformer.export.check.parity import Expected, Runs
from edgeformer.export.source import AnySource, EncoderDecoderSource


class ModelChecks(Protocol):
    """What PyTorch gives for a model, and how its graphs are compared with that."""

    @property
    def source(self) -> AnySource:
        """The model."""

    def expected(self) -> Expected:
        """PyTorch's outputs, with the weights that the module has now, for everything that is compared."""

    def advice(self, error: ParityError) -> str:
        """How to correct a module whose float graph is wrong, if the error shows the cause; else empty."""

    def reference_inputs(self) -> dict[str, torch.Tensor]:
        """The input that is stored in the bundle for `edgeformer verify`."""

    def in_pytorch(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, F32]:
        """PyTorch's outputs for `reference_inputs`."""

    def in_graphs(self, inputs: Mapping[str, torch.Tensor], graphs: Mapping[str, Runs]) -> dict[str, Any]:
        """The graphs' outputs for `reference_inputs`."""

    @property
    def reference_rows(self) -> slice:
        """The positions (axis 1) whose outputs are stored."""


def checks_of(source: AnySource, *, cached: bool) -> ModelChecks:
    """The checks of a model; `cached` if it has a KV cache."""
    if isinstance(source, EncoderDecoderSource):
        return EncoderDecoderChecks(source)
    return OneGraphChecks(source, cached)
