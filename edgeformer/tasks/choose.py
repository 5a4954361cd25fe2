"""The task object of a bundle, chosen from its manifest: the one place that knows which model does what."""

from __future__ import annotations

from collections.abc import Mapping

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.prefixes import PrefixCacheOption, make_prefix_cache
from edgeformer.decoding.speculation.speculation import Speculation
from edgeformer.engines.base import Engine
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.tasks.embedding import Encoder
from edgeformer.tasks.seq2seq import EncoderDecoder
from edgeformer.tasks.text_generation import TextGeneration

Task = TextGeneration | EncoderDecoder | Encoder


def choose_task(
    bundle: Bundle, engines: Mapping[str, Engine], tokenizer: Tokenizer | None, prefix_cache: PrefixCacheOption = None
) -> Task:
    """What a loaded bundle does. `engines` has one for each graph of it; `prefix_cache` is of `load`.

    Two graphs are an encoder-decoder. One graph with `input_ids` and `logits` whose task is text-generation generates
    text. Any other is an encoder: of text, pictures, sound or plain arrays.
    """
    graphs = bundle.manifest["graphs"]
    if "encoder" in graphs:
        limits = Limits.of(bundle, engines["decoder"], "decoder")
        return EncoderDecoder(bundle, engines["encoder"], engines["decoder"], tokenizer, limits)
    graph, engine = graphs["model"], engines["model"]
    if bundle.task == "text-generation" and IDS in graph["inputs"] and "logits" in graph["outputs"]:
        limits = Limits.of(bundle, engine)
        speculation = Speculation(limits, tokenizer, is_exact=engine.rows_are_exact)
        cache = make_prefix_cache(engine, limits, prefix_cache)
        return TextGeneration(bundle, engine, tokenizer, limits, cache, speculation)
    return Encoder(bundle, engine, tokenizer)
