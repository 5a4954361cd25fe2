"""`edgeformer run --prompts`: many prompts from a JSON Lines file, answered together into another one.

A line of the input is a text, a list of token ids, a list of messages, or an object with `prompt` or `messages`, an
optional `id`, and arguments of `Model.generate` for this line. Line i of the output is the answer to line i: answers
are written in order, so that a run that was interrupted goes on behind the last whole line. Each names its `input`, a
digest of the line, the flags and the bundle: answers to other questions never stand in one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from edgeformer.cli.console import stderr
from edgeformer.cli.exit_codes import CHECK_FAILED, DONE
from edgeformer.cli.options import BatchFlags, GenerationFlags
from edgeformer.cli.run import Runner
from edgeformer.decoding.generation import Ended
from edgeformer.decoding.result import Result
from edgeformer.errors import InputError

Request = tuple[Any, dict[str, Any]]
# What some readers, such as str.splitlines(), take for the end of a line -> its escape in JSON.
BREAKS = {number: f"\\u{number:04x}" for number in (0x85, 0x2028, 0x2029)}


def read_requests(path: Path, given: str) -> list[tuple[str, Any, Request]]:
    """(digest, its `id` or None, (prompt, arguments)) for each line that is not blank.

    The digest is that of the line and of `given`: all else that its answer depends on.

    Raises:
        InputError: the file cannot be read, or a line is none of the forms above; it names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028, which JSON may hold
        if line.strip():
            name, request = _request(f"{path}, line {number}", line)
            found.append((hashlib.sha256(f"{line.strip()}\n{given}".encode()).hexdigest()[:16], name, request))
    if not found:
        raise InputError(f"{path} has no prompts; write one JSON value on each line.")
    return found


def _request(where: str, line: str) -> tuple[Any, Request]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f'{where} is not JSON ({error}); a text needs quotes: "Hello".') from error
    if isinstance(value, (str, list)):
        return None, (value, {})
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise InputError(f"{where}: expected a text, a list, or an object with either 'prompt' or 'messages'.")
    arguments = dict(value)
    prompt = arguments.pop("prompt", None) if "prompt" in value else arguments.pop("messages")
    return arguments.pop("id", None), (prompt, arguments)


def run_prompts(runner: Runner, batch: BatchFlags, generation: GenerationFlags) -> int:
    """Answers all prompts; returns the exit code: that of a failed check if a prompt failed.

    Raises:
        InputError: a file is malformed, there is no output, or it belongs to other prompts, options or another bundle.
    """
    prompts, output = batch.prompts, batch.output
    assert prompts is not None
    if output is None:
        raise InputError("--prompts needs --output FILE.jsonl for the answers.")
    arguments = generation.arguments()
    given = json.dumps(arguments, sort_keys=True, default=str)
    requests = read_requests(prompts, f"{given} {runner.opened.fingerprint}")
    done, failed = _resume(output, [digest for digest, _, _ in requests])
    if done == len(requests):
        stderr.print(f"{output} has all {done} answers already" + (f"; {failed} of them failed." if failed else "."))
        return CHECK_FAILED if failed else DONE
    model, faster = runner.load()
    if done:
        stderr.print(f"[dim]{done} of {len(requests)} answers are in {output}; going on.[/dim]")
    upcoming = [request for _, _, request in requests[done:]]
    each = model.generate_each(upcoming, max_sequences=batch.max_sequences, **arguments, **faster)
    tokens = 0
    # disable=None: no bar where stderr is no terminal
    bar = tqdm(total=len(requests), initial=done, unit="prompt", dynamic_ncols=True, smoothing=0.1, disable=None)
    # An `id` may hold a lone surrogate, which UTF-8 cannot: the replacement is its escape in JSON.
    with output.open("a", encoding="utf-8", errors="backslashreplace") as file, bar:
        for ended in _in_order(each, bar):
            digest, name, _ = requests[done + ended.index]
            entry: dict[str, Any] = {"line": done + ended.index + 1, "input": digest}
            if name is not None:
                entry["id"] = name
            if ended.error is not None:
                failed += 1
                entry["error"] = {"type": type(ended.error).__name__, "message": str(ended.error)}
            else:
                answers = [_entry(result) for result in ended.results]
                entry |= answers[0] if len(answers) == 1 else {"answers": answers}
                tokens += sum(len(result.ids) for result in ended.results)
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            file.write(json.dumps(entry, ensure_ascii=False).translate(BREAKS) + "\n")
            file.flush()
    if failed:
        stderr.print(f"[yellow]{failed} of {len(requests)} prompts failed; see `error` in {output}.[/yellow]")
    return CHECK_FAILED if failed else DONE


def _in_order(each: Iterator[Ended], bar: tqdm[Any]) -> Iterator[Ended]:
    """The same by their index; the bar counts them as they end."""
    held: dict[int, Ended] = {}
    following = 0
    for ended in each:
        bar.update()
        held[ended.index] = ended
        while following in held:
            yield held.pop(following)
            following += 1


def _entry(result: Result) -> dict[str, Any]:
    entry: dict[str, Any] = {"text": result.text, "finish_reason": result.finish_reason, "ids": result.ids}
    if result.answer is not None:
        entry |= {"content": result.content, "tool_calls": [call.message() for call in result.tool_calls]}
        if result.reasoning:
            entry["reasoning"] = result.reasoning
    if result.logprobs is not None:
        entry["logprobs"] = [{"id": one.id, "text": one.text, "logprob": one.logprob} for one in result.logprobs]
    entry["timings"] = asdict(result.timings)
    return entry


def _resume(output: Path, digests: list[str]) -> tuple[int, int]:
    """(how many answers `output` has, how many of them are errors); a last line that was cut off is removed.

    Raises:
        InputError: the file holds something else, or other answers.
    """
    if not output.exists():
        return 0, 0
    failed = 0
    data = output.read_bytes()
    whole = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:whole].splitlines()):
        try:
            entry = json.loads(line)
            fits = number < len(digests) and (entry["line"], entry["input"]) == (number + 1, digests[number])
            failed += "error" in entry
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise InputError(
                f"{output}, line {number + 1} is no answer to line {number + 1} of the prompts with these options and "
                "this bundle; "
                "move the file away, or give another --output."
            )
    if whole < len(data):
        with output.open("r+b") as file:
            file.truncate(whole)
    return data[:whole].count(b"\n"), failed
