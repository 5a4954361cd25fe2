"""Transcriptions through the official client: those of `Model.transcribe`, in every format, and what is refused."""

from __future__ import annotations

import io
import json
import re
import time

import httpx
import numpy as np
import openai
import pytest
from support import speech
from support.serving import running, wait_for

pytest.importorskip("torch", reason="the bundle is exported by the toolchain")

import edgeformer
from edgeformer.decoding.scheduler import Scheduler

SOUND = speech.recording(1, 3)
WAV = speech.wav(SOUND)
TYPES = {"text": "text/plain", "srt": "text/plain", "vtt": "text/vtt"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return speech.write_whisper(tmp_path_factory.mktemp("audio"))[0]


@pytest.fixture(scope="module")
def model(bundle):
    """The same model without a server."""
    return edgeformer.load(bundle, threads=1)


@pytest.fixture(scope="module")
def server(bundle, served):
    with running([f"whisper={bundle}", f"lm={served['lm']}"], {"max_audio": 1 << 20, "max_audio_seconds": 30}) as one:
        yield one


@pytest.fixture
def client(server):
    with server.client() as one:
        yield one


@pytest.fixture(scope="module")
def same(model, tmp_path_factory):
    """`same(data, **more)`: what `Model.transcribe` gives for these bytes."""
    folder = tmp_path_factory.mktemp("files")

    def get(data=WAV, **more):
        (folder / "sound").write_bytes(data)
        return model.transcribe(folder / "sound", **more)

    return get


def named(data, name="talk.wav"):
    file = io.BytesIO(data)
    file.name = name
    return file


def other(form):
    """The bytes of the recording in another format, at another rate, in two channels."""
    soundfile = pytest.importorskip("soundfile", reason="the extra audio")
    pytest.importorskip("soxr", reason="the extra audio")
    file = io.BytesIO()
    twice = np.repeat(SOUND, 2)
    soundfile.write(file, np.stack([twice, twice], 1) * 0.5, 2 * speech.RATE, format=form)
    return file.getvalue()


def test_a_transcript_is_that_of_transcribe(client, same):
    found = client.audio.transcriptions.create(model="whisper", file=named(WAV))
    expected = same()
    assert found.text == expected.text and len(expected.text) > 10
    assert (found.usage.type, found.usage.seconds) == ("duration", round(expected.seconds, 3))
    assert found.logprobs is None


@pytest.mark.parametrize(
    "fields", [{"language": "fr"}, {"prompt": "lazy dog"}, {"temperature": 1.0, "extra_body": {"seed": 5}}]
)
def test_a_field_does_what_the_argument_does(client, same, fields):
    found = client.audio.transcriptions.create(model="whisper", file=named(WAV), **fields)
    given = {**fields, **fields.get("extra_body", {})}
    given.pop("extra_body", None)
    assert found.text == same(**given).text != same().text


def test_a_translation_is_of_its_own_task(client, same):
    found = client.audio.translations.create(model="whisper", file=named(WAV))
    assert found.text == same(task="translate").text != same().text
    verbose = client.audio.translations.create(model="whisper", file=named(WAV), response_format="verbose_json")
    assert verbose.language == "english" and verbose.text == same(task="translate", timestamps=True).text


@pytest.mark.parametrize("form", ["FLAC", "MP3", "OGG"])
def test_other_files_are_read_as_the_runtime_reads_them(client, same, form):
    data = other(form)
    found = client.audio.transcriptions.create(model="whisper", file=named(data, f"a.{form.lower()}"))
    assert found.text == same(data).text


@pytest.mark.parametrize("more", [{}, {"timestamp_granularities": ["segment"]}])
def test_verbose_json_has_segments(client, same, more):
    found = client.audio.transcriptions.create(
        model="whisper", file=named(WAV), response_format="verbose_json", language="en", **more
    )
    type(found).model_validate(found.model_dump())  # strict: nothing required is missing
    expected = same(language="en", timestamps=True, logprobs=True)
    assert (found.text, found.language, found.duration) == (expected.text, "en", round(expected.seconds, 3))
    assert len(found.segments) == len(expected.segments) > 1
    for number, (one, segment) in enumerate(zip(found.segments, expected.segments, strict=True)):
        assert (one.id, one.text, one.tokens) == (number, segment.text, segment.ids)
        assert (one.start, one.end) == pytest.approx((segment.start, segment.end), abs=1e-3)
        assert one.avg_logprob == pytest.approx(segment.avg_logprob)
        assert one.no_speech_prob == pytest.approx(segment.silence)
        assert (one.seek, one.temperature) == (100 * segment.window, 0) and one.compression_ratio > 0


TIME = r"(\d\d):(\d\d):(\d\d)[.,](\d\d\d)"


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
def test_text_and_subtitles(server, client, same, form):
    found = client.audio.transcriptions.create(model="whisper", file=named(WAV), response_format=form)
    raw = httpx.post(
        server.url + "/v1/audio/transcriptions",
        files={"file": ("a.wav", WAV)},
        data={"model": "whisper", "response_format": form},
    )
    assert raw.headers["content-type"].partition(";")[0] == TYPES[form]
    assert raw.text == str(found)
    if form == "text":
        assert raw.text == same().text + "\n"
        return
    expected = same(timestamps=True).segments
    assert raw.text.startswith("WEBVTT\n\n") == (form == "vtt")
    cues = re.findall(rf"{TIME} --> {TIME}\n(.*)\n", raw.text)
    assert len(cues) == len(expected)
    for cue, segment in zip(cues, expected, strict=True):
        hours, minutes, seconds, parts = map(int, cue[:4])
        assert 3600 * hours + 60 * minutes + seconds + parts / 1000 == pytest.approx(segment.start, abs=1e-3)
        assert cue[8].split() == segment.text.replace("-->", "->").split()
    mark, wrong = ("," if form == "srt" else "."), ("." if form == "srt" else ",")
    assert re.search(rf"\d\d{re.escape(mark)}\d\d\d -->", raw.text)
    assert not re.search(rf"\d\d{re.escape(wrong)}\d\d\d -->", raw.text)


def test_logprobs_are_those_of_the_tokens(client, same):
    found = client.audio.transcriptions.create(model="whisper", file=named(WAV), include=["logprobs"])
    expected = same(logprobs=True).logprobs
    assert [one.logprob for one in found.logprobs] == pytest.approx([one.logprob for one in expected])
    assert [bytes(map(int, one.bytes)) for one in found.logprobs] == [one.bytes for one in expected]


@pytest.mark.parametrize("more", [{}, {"include": ["logprobs"]}, {"response_format": "text"}])
def test_a_stream_has_deltas_and_the_whole(client, same, more):
    events = list(client.audio.transcriptions.create(model="whisper", file=named(WAV), stream=True, **more))
    *deltas, done = events
    assert {one.type for one in deltas} == {"transcript.text.delta"} and len(deltas) > 2
    assert done.type == "transcript.text.done"
    assert done.text == "".join(one.delta for one in deltas) == same().text
    if "include" in more:
        assert [one.logprob for delta in deltas for one in delta.logprobs] == [one.logprob for one in done.logprobs]
        assert len(done.logprobs) == len(same(logprobs=True).logprobs)
    else:
        assert done.logprobs is None and deltas[0].logprobs is None


def refused(server, data=None, file=WAV, status=400, path="transcriptions", **more):
    files = {"file": ("talk.wav", file)} if file is not None else {"other": ("", b"")}
    found = httpx.post(f"{server.url}/v1/audio/{path}", files=files, data={"model": "whisper", **(data or {})}, **more)
    assert found.status_code == status, found.text
    return found.json()["error"]


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"foo": "1"}, "foo"),
        ({"chunking_strategy": "auto"}, "chunking_strategy"),
        ({"chunking_strategy[type]": "server_vad", "chunking_strategy[threshold]": "0.5"}, "chunking_strategy"),
        ({"known_speaker_names[]": ["a"]}, "known_speaker_names"),
        ({"known_speaker_references[]": ["a"]}, "known_speaker_references"),
        ({"keywords[]": ["a"]}, "keywords"),
        ({"languages[]": ["de", "en"]}, "languages"),
        ({"language": "xx"}, "language"),
        ({"language": ["de", "en"]}, "language"),
        ({"temperature": "2"}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"timestamp_granularities[]": "word", "response_format": "verbose_json"}, "timestamp_granularities"),
        ({"timestamp_granularities[]": "line", "response_format": "verbose_json"}, "timestamp_granularities[0]"),
        ({"timestamp_granularities[]": "segment"}, "timestamp_granularities"),
        ({"include[]": "logprobs", "response_format": "text"}, "include"),
        ({"include[]": "speakers"}, "include[0]"),
        ({"stream": "true", "response_format": "srt"}, "stream"),
        ({"stream": "maybe"}, "stream"),
        ({"model": "lm"}, "model"),
    ],
)
def test_a_wrong_field_is_refused_by_name(server, data, param):
    assert refused(server, data)["param"] == param


@pytest.mark.parametrize(
    ("data", "param"),
    [({"language": "de"}, "language"), ({"stream": "true"}, "stream"), ({"include[]": "a"}, "include")],
)
def test_a_translation_has_fewer_fields(server, data, param):
    assert refused(server, data, path="translations")["param"] == param


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize(
    "file",
    [b"", b"hello", WAV[:200], WAV[:40], b"ID3" + bytes(500), b"fLaC" + bytes(100), speech.wav(SOUND[:0])],
    ids=range(7),
)
def test_a_bad_file_is_a_typed_error(server, file, stream):
    error = refused(server, {"stream": stream}, file)
    assert error["param"] == "file" and error["type"] == "invalid_request_error"
    assert "/" not in error["message"].replace("s/", "")  # no path of this machine


def test_a_form_that_is_none_is_refused(server):
    url = server.url + "/v1/audio/transcriptions"
    assert httpx.post(url, json={"model": "whisper"}).status_code == 415
    assert httpx.post(url, data={"model": "whisper"}).status_code == 415
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    for content in (b"", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", b"--y", b"--x\r\n"):
        assert httpx.post(url, content=content, headers=broken).status_code == 400
    assert httpx.post(url, content=b"a", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    assert refused(server, file=None)["param"] in ("file", "other")
    assert refused(server, {"file": "text"}, file=None)["param"] in ("file", "other")
    two = [("file", ("a", WAV)), ("file", ("b", WAV))]
    assert httpx.post(url, files=two, data={"model": "whisper"}).status_code == 400


def test_limits_of_bytes_and_of_sound(server):
    assert refused(server, file=bytes(2 << 20), status=413)["code"] == "request_too_large"
    long = speech.wav(np.zeros(400_000, np.float32), rate=8000)  # 50 s
    assert "the limit is 30 s" in refused(server, file=long)["message"]
    soundfile = pytest.importorskip("soundfile", reason="the extra audio")
    packed = io.BytesIO()  # 400 s of silence in few bytes
    soundfile.write(packed, np.zeros(400 * speech.RATE, np.float32), speech.RATE, format="FLAC")
    assert len(packed.getvalue()) < 1 << 20
    assert "400 s of sound, the limit is 30 s" in refused(server, file=packed.getvalue())["message"]


@pytest.mark.parametrize(("origin", "status"), [("http://evil.example", 403), ("null", 403), (None, 200), ("own", 200)])
def test_a_page_of_another_origin_sends_no_form(server, origin, status):
    headers = {} if origin is None else {"Origin": server.url if origin == "own" else origin}
    found = httpx.post(
        server.url + "/v1/audio/transcriptions",
        files={"file": ("a.wav", WAV)},
        data={"model": "whisper"},
        headers=headers,
    )
    assert found.status_code == status, found.text


@pytest.fixture
def slow_steps(monkeypatch):
    """Each step of the decoder takes 50 ms more; the list counts them."""
    steps, step = [], Scheduler.step

    def slower(self):
        steps.append(1)
        time.sleep(0.05)
        step(self)

    monkeypatch.setattr(Scheduler, "step", slower)
    return steps


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work(server, client, slow_steps, stream):
    client.audio.transcriptions.create(model="whisper", file=named(speech.wav(SOUND[:4000])))
    loaded = server.loaded("whisper")
    slow_steps.clear()
    sound = speech.wav(speech.recording(7, 12))
    quick = client.with_options(timeout=0.6)
    if stream:
        with quick.audio.transcriptions.create(model="whisper", file=named(sound), stream=True) as events:
            assert next(iter(events)).delta
    else:
        with pytest.raises(openai.APITimeoutError):
            quick.audio.transcriptions.create(model="whisper", file=named(sound))
    wait_for(lambda: not loaded.turn.locked())
    done = len(slow_steps)
    assert 0 < done < 60  # 12 windows of some 60 steps, eight together, are many more
    time.sleep(0.2)
    assert len(slow_steps) == done
    assert client.audio.transcriptions.create(model="whisper", file=named(speech.wav(SOUND[:4000]))).text is not None


def test_two_recordings_take_turns(server, client, same):
    import threading

    found, sounds = {}, {number: speech.wav(speech.recording(number, 2)) for number in range(4)}

    def ask(number):
        found[number] = client.audio.transcriptions.create(model="whisper", file=named(sounds[number])).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in sounds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: same(data).text for number, data in sounds.items()}


def test_the_document_names_the_form(server):
    found = httpx.get(server.url + "/openapi.json").json()
    body = found["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    assert list(body) == ["multipart/form-data"]
    name = body["multipart/form-data"]["schema"]["$ref"].rpartition("/")[2]
    assert found["components"]["schemas"][name]["properties"]["file"] == {"type": "string", "format": "binary"}
    assert json.dumps(found)
