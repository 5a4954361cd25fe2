"""A random Whisper with times, languages and tasks, exported once; and recordings for it."""

from __future__ import annotations

import io
import json
import wave

import numpy as np
from support import tiny

RATE = 16000  # samples of a window: it is one second long
POSITIONS = 50  # states of the encoder, and steps of time
LANGUAGES = ("de", "en", "fr")
TASKS = ("transcribe", "translate")
END = "<|endoftranscript|>"  # right before "no times", as transformers' rules take for granted
SPECIAL = (
    "<|startofprev|>", "<|nospeech|>", *(f"<|{name}|>" for name in (*LANGUAGES, *TASKS)), END, "<|notimestamps|>"
)  # fmt: skip


def write_source(folder):
    """A folder as transformers writes it; returns the model."""
    import torch
    import transformers as tf
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir(parents=True)
    tiny.tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    times = [f"<|{step * 0.02:.2f}|>" for step in range(POSITIONS + 1)]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIAL, *times)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL}
    torch.manual_seed(1)
    audio = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": ids[END], "decoder_start_token_id": 1}
    quiet = {"begin_suppress_tokens": None, "suppress_tokens": None, "max_target_positions": 64, "init_std": 0.4}
    config = tf.WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(), max_source_positions=POSITIONS, **audio, **heads, **tokens, **quiet
    )
    model = tf.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        model.model.decoder.layers[0].encoder_attn.out_proj.weight *= 8  # so that what is said depends on the sound
        model.model.decoder.embed_tokens.weight[ids["<|notimestamps|>"] + 1 :] *= 1.4  # so that times are likely
    model.eval().save_pretrained(folder)
    tf.WhisperFeatureExtractor(feature_size=40, chunk_length=1).save_pretrained(folder)
    settings = {
        "lang_to_id": {f"<|{name}|>": ids[f"<|{name}|>"] for name in LANGUAGES},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in TASKS},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_initial_timestamp_index": 20,
        "is_multilingual": True,
        "eos_token_id": ids[END],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "decoder_start_token_id": 1,
        "suppress_tokens": [0, 1, 2, *(number for text, number in ids.items() if text not in SPECIAL[-2:])],
        "max_length": 64,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return model


def write_whisper(folder):
    """(the bundle, the model that it was made from)."""
    from edgeformer.export.options import ExportOptions
    from edgeformer.export.pipeline import export

    model = write_source(folder / "source")
    export(ExportOptions(source=str(folder / "source"), output=folder / "bundle", quantize="none"))
    return folder / "bundle", model


def recording(number, windows):
    """float32 samples: tones and noise, another one in each window; the last window is not full."""
    rng = np.random.default_rng(number)
    time = np.arange(RATE) / RATE
    parts = [np.sin(time * rng.uniform(500, 20000)) * rng.uniform(0.1, 0.5) for _ in range(windows)]
    samples = np.concatenate(parts) + rng.standard_normal(windows * RATE) * rng.uniform(0.001, 0.2)
    return samples[: len(samples) - RATE // 3].astype(np.float32)


def wav(samples, rate=RATE):
    """The bytes of a PCM WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", "NONE"))
        out.writeframes((samples * 20000).clip(-32768, 32767).astype("<i2").tobytes())
    return file.getvalue()
