"""One answer in the making: which tokens run next, and what their logits become.

A step runs the tokens that the state does not hold yet: a chunk of the prompt, or the last token and its drafts
(guesses of what follows). The logits after each of these rows choose a token as if it had run alone. The first draft
that is not the chosen token ends the step, and the state forgets it and all after it. So an answer is the same with
and without drafts, greedy or sampled (speculative decoding with exact matches; Leviathan et al. 2023 accept more
drafts of a sampled answer, but change its tokens).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.answer_text import AnswerText, text_stream
from edgeformer.decoding.constrained_choice import ConstrainedChoice
from edgeformer.decoding.constraints.constraint import Constraint
from edgeformer.decoding.context import shortened
from edgeformer.decoding.job import Progress, Rows
from edgeformer.decoding.logits_processors import next_token
from edgeformer.decoding.logprobs import TokenLogprob, prompt_logprobs, token_logprobs
from edgeformer.decoding.request import Request
from edgeformer.decoding.result import Drafts, Piece, Result, Timings
from edgeformer.decoding.sampling import check, likeliest
from edgeformer.decoding.session import Session, StateSource
from edgeformer.decoding.tools.answer import AnswerPiece, gather
from edgeformer.engines.base import CHUNK_TOKENS
from edgeformer.errors import EdgeformerError, GrammarError, StateError
from edgeformer.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeformer.decoding.speculation.sequence_drafts import SequenceDrafts


class Sequence:
    """One answer to one prompt. It never calls the engine; see `edgeformer.decoding.job.Job`."""

    slots = 1

    def __init__(
        self,
        request: Request,
        states: StateSource,
        tokenizer: Tokenizer | None,
        index: int = 0,
        guesses: SequenceDrafts | None = None,
    ) -> None:
        self.request = request
        self.index = index  # among the answers to the prompt
        self.ids = list(request.prompt)  # the prompt and all new tokens
        self.reason: str | None = None
        self.error: Exception | None = None
        self.siblings: list[Sequence] = []  # other answers to the same prompt, which wait for it to run
        self.is_waiting = False  # this is such an answer
        self._states = states
        self._session: Session | None = None
        self._context = self.ids  # what the state shall hold: another list once the context slid
        self._drafts: list[int] = []
        self._running = 0  # tokens of the step that runs, without drafts
        self.guesses = guesses  # what drafts are made of; None without speculation
        self.proposed = self.accepted = 0  # drafts
        self.counted = Progress()
        self._text = AnswerText(text_stream(tokenizer, request.shape), request.config.stop_strings)
        self._parser = request.shape.parser()
        self._parts: list[AnswerPiece] = []  # of the whole answer
        self._choice = None
        if request.shape.grammar is not None:
            constraint = request.shape.grammar.start(learns=guesses is not None)
            self._choice = ConstrainedChoice(request.processors, request.config, constraint)
        self._token_texts = None if tokenizer is None or not request.wants_logprobs else tokenizer.token_texts
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._rng = request.rng(index)
        self._seen = np.array(self.ids, np.int64) if request.processors else np.empty(0, np.int64)
        self._pieces: list[Piece] = []
        self._reused = 0
        self._began = self._prompt_end = self._first = self._last = time.perf_counter()
        self._queued = 0.0

    # ------------------------------------------------------------------------------------------------------ the state

    @property
    def tokens(self) -> int:
        """The most tokens that the state will hold."""
        return self.request.tokens

    @property
    def session(self) -> Session:
        """The state and the tokens that it holds; from the first `pending` to `release`."""
        assert self._session is not None
        return self._session

    @property
    def count(self) -> int:
        """The number of new tokens."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def constraint(self) -> Constraint | None:
        """Its place in the grammar that it follows."""
        return None if self._choice is None else self._choice.constraint

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.count, self.proposed, self.accepted, self._last)

    @property
    def decodes(self) -> bool:
        """Whether all tokens but the last have run, so that the next step gives a new one."""
        if self.count == 0 or self._session is None:
            return False
        return not self.request.limits.cached or len(self._session.ids) == len(self._context) - 1

    def start(self) -> None:
        """Ends its time in the queue. The state is made when the prompt runs: until then others may cache it."""
        now = time.perf_counter()
        self._queued = now - self._began
        self._began = self._prompt_end = self._first = self._last = now

    def _open(self) -> None:
        """Makes the state, or takes one that holds a beginning of the prompt."""
        if self._is_full():
            self._slide()
        # The logits of tokens that ran before are gone: their log probabilities need them to run again.
        self._session = self._states.open(self._context, empty=self._scores_prompt)
        self._session.user = self
        self._reused = self._session.reuse(self._context)

    def release(self) -> None:
        """Drops the state; its memory is free once no session and no cache holds it."""
        session, self._session = self._session, None
        if session is not None and session.user is self:
            session.user = None
            if self.error is None:
                self._states.keep(session)

    # ------------------------------------------------------------------------------------------------------- one step

    @property
    def draft_room(self) -> int:
        """How many drafts the next step can take."""
        limits = self.request.limits
        room = self.request.max_new_tokens - self.count - 1
        return room if limits.context is None else min(room, limits.context - len(self._context))

    def draft(self, tokens: Tokens[int]) -> None:
        """Guesses of the tokens that follow, for the next step; the sequence must decode."""
        self._drafts = list(tokens[: max(0, self.draft_room)])

    def pending(self, room: int) -> Rows | None:
        """The last token and its drafts; else the next tokens of the prompt, at most `room`. None while it waits.

        Raises:
            StateError: another answer has taken its session.
        """
        if self.is_waiting:
            return None
        if self._session is None:
            self._open()
        if self.session.user is not self:
            raise StateError("Another answer runs in this session now; end one before the next, or use two sessions.")
        session, context = self.session, self._context
        start = len(session.ids) if self.request.limits.cached else 0
        end = min(start + room, len(context)) if self.request.limits.cached else len(context)
        drafts = self._drafts if end == len(context) else []
        if end < len(context) and end - end % CHUNK_TOKENS > start:
            end -= end % CHUNK_TOKENS  # whole chunks, for the prefix cache
        ids, keep = context[start:end] + drafts, 1 + len(drafts)
        self._running = end - start
        if self._scores_prompt:
            keep = len(ids)
        return Rows(np.array([ids], np.int64), session.state, keep)

    def prepare(self) -> None:
        """As `Job.prepare`: the mask of the next token, where it will be needed."""
        is_last = len(self.session.ids) + self._running == len(self._context)
        if self._choice is not None and self._choice.needs_mask and (is_last or not self.request.limits.cached):
            self._choice.constraint.prepare()

    def accept(self, logits: Array, likeliest: Array | None = None) -> None:
        """Takes the logits [1, rows, vocab] that `pending` asked for: the tokens that follow, up to a wrong draft.

        Raises:
            EdgeformerError: the logits hold NaN, the logits processors leave no token, or the context is full.
        """
        session, cached = self.session, self.request.limits.cached
        held = len(session.ids) if cached else 0
        if self._scores_prompt:
            self._score_prompt(logits[0], held)
        if cached:
            session.ids += self._context[held : held + self._running]
            if len(session.ids) < len(self._context):
                if len(session.ids) % CHUNK_TOKENS == 0:
                    self._states.keep(session)
                return
        if self.count == 0:
            self._end_prompt(logits[0, -1])
        known, drafts, self._drafts = len(self._context), self._drafts, []
        first = logits.shape[1] - len(drafts) - 1
        for row in range(len(drafts) + 1):
            self._choose(logits[0, first + row], None if likeliest is None else int(likeliest[0, first + row]))
            if self.reason is not None or row == len(drafts) or self.ids[-1] != drafts[row]:
                break
        if drafts:
            right = len(self._context) - 1  # the last token has not run as itself
            self.proposed += len(drafts)
            self.accepted += right - known
            if cached:
                session.ids += self._context[known:right]
                session.state.truncate(right)
        self._keep_room()

    def take(self) -> list[Piece]:
        """The pieces since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def fail(self, error: Exception) -> None:
        """Ends it with an error; an answer that waits for its prompt to run takes over."""
        self.error = error
        self._hand_over()

    def cancel(self) -> None:
        """Ends it as it is."""
        self.reason = "cancel"
        self._add(None, self._text.flush())
        self._hand_over()

    def result(self) -> Result:
        """The answer so far; the whole one after its end."""
        timings = Timings(
            len(self.request.prompt),
            self._reused,
            self._prompt_end - self._began,
            self._first - self._began,
            self.count,
            self._last - self._first,
            self._queued,
        )
        return Result(
            self._text.shown,
            self.ids[len(self.request.prompt) :],
            self.reason or "cancel",
            timings,
            drafts=Drafts(self.proposed, self.accepted),
            logprobs=None if self.request.logprobs is None else list(self._logprobs),
            prompt_logprobs=None if self.request.prompt_logprobs is None else list(self._prompt_logprobs),
            answer=None if self._parser is None else gather(self._parts),
        )

    # ---------------------------------------------------------------------------------------------------- a new token

    def _choose(self, logits: Array, best: int | None = None) -> None:
        """Adds the token after `logits` [vocab], whose largest is at `best` if that is known; it may end the answer."""
        request = self.request
        try:
            scores = np.asarray(logits, np.float32)
            token = self._next_token(scores, best)
        except EdgeformerError as error:
            kind = GrammarError if isinstance(error, GrammarError) else EdgeformerError
            raise kind(f"Step {self.count} of the generation, after {len(self.ids)} tokens: {error}") from error
        self._last = time.perf_counter()
        if self.count == 0:
            self._first = self._last
        self.ids.append(token)
        if self._context is not self.ids:
            self._context.append(token)
        if request.processors:
            self._seen = np.append(self._seen, token)
        if request.logprobs is not None:
            self._logprobs += token_logprobs(scores[None], [token], request.logprobs, self._token_texts)
        is_end = token in request.limits.eos
        piece = "" if is_end else self._text.push(token)
        self.reason = "eos" if is_end else self._end()
        if self.reason is not None:
            piece += self._text.flush()
            if self._text.is_stopped and not is_end:
                self.reason = "stop"
        self._add(token, piece)

    def _next_token(self, scores: Array, best: int | None) -> int:
        """The token that follows `scores` [vocab]; the constraint has accepted it."""
        processors, choice, rng = self.request.processors, self._choice, self._rng
        largest = None
        if not self.request.config.remove_invalid_values:
            best = likeliest(scores) if best is None else best
            largest = scores[best]
            check(largest)
        if choice is None and rng is None and not processors and best is not None:
            return best
        if choice is None:
            return next_token(processors, self._seen, scores, rng, largest)
        token = choice.token(self._seen, scores, rng, None if processors else best)
        choice.constraint.accept(token)
        return token

    def _add(self, token: int | None, text: str) -> None:
        """A piece for the caller."""
        parts: list[AnswerPiece] = []
        if self._parser is not None:
            parts = self._parser.push(text) if text else []
            parts += self._parser.finish() if self.reason is not None else []
            self._parts += parts
        logprob = self._logprobs[-1] if self._logprobs and token is not None else None
        self._pieces.append(Piece(token, text, self.reason, self.index, tuple(parts), logprob))

    def _end(self) -> str | None:
        """Why the answer ends with its last token, if it does.

        Raises:
            ContextError: the context is full, and the policy is "error".
        """
        request = self.request
        if self._text.is_stopped or (self.constraint is not None and self.constraint.ended):
            return "stop"
        if self.count >= request.max_new_tokens:
            return "length"
        if request.config.max_time is not None and self._last - self._began > request.config.max_time:
            return "time"
        if self._is_full() and request.context_policy != "slide":
            if request.context_policy == "error":
                request.limits.refuse_length(len(self._context))
            return "context"
        return None

    def _is_full(self) -> bool:
        """Whether the context cannot take the tokens that the state should hold."""
        context = self.request.limits.context
        return context is not None and len(self._context) > context

    def _keep_room(self) -> None:
        """After a new token: the next one must fit, too."""
        if self.reason is None and self._is_full():
            self._slide()

    def _slide(self) -> None:
        """Drops old tokens of the context. What is left runs again: at other positions its keys are others."""
        context = self.request.limits.context
        assert context is not None
        self._context = shortened(self._context, context, self.request.context_protect)
        if self._session is not None:
            self._session.reuse(self._context)

    @property
    def _scores_prompt(self) -> bool:
        """Whether all logits of the prompt are wanted."""
        return self.count == 0 and self.request.prompt_logprobs is not None

    def _score_prompt(self, logits: Array, start: int) -> None:
        """Adds the log probabilities of the prompt's tokens from `start` + 1 on, from `logits` [rows, vocab]."""
        count, context = self.request.prompt_logprobs, self._context
        assert count is not None
        if not self._prompt_logprobs:
            self._prompt_logprobs = prompt_logprobs(logits[:0], context[:1], count, self._token_texts)
        following = context[start + 1 : start + 1 + len(logits)]
        self._prompt_logprobs += token_logprobs(logits[: len(following)], following, count, self._token_texts)

    # --------------------------------------------------------------------------------------- answers to one same prompt

    def _end_prompt(self, logits: Array) -> None:
        """The prompt has run: each sibling goes on with a fork of the state."""
        self._prompt_end = time.perf_counter()
        self._states.keep(self.session)
        siblings, self.siblings = self.siblings, []
        for sibling in siblings:
            if sibling.reason is None and sibling.error is None:
                sibling._follow(self, logits)

    def _follow(self, first: Sequence, logits: Array) -> None:
        self.is_waiting = False
        self._prompt_logprobs = first._prompt_logprobs
        try:
            self._session = Session(first.session.state.fork(), first.session.ids)
            self._session.user = self
            self._context = self.ids if first._context is first.ids else list(first._context)
            self._reused = len(self._context)
            self._prompt_end = time.perf_counter()
            self._choose(logits)
            self._keep_room()
        except (EdgeformerError, MemoryError) as error:
            self.fail(error)

    def _hand_over(self) -> None:
        """It ends before its prompt has run: the next sibling runs the prompt, from where it is."""
        siblings = [one for one in self.siblings if one.reason is None and one.error is None]
        self.siblings = []
        if not siblings:
            return
        heir, *rest = siblings
        heir.is_waiting, heir.siblings = False, rest
        if self._session is not None:
            heir._session, self._session = self._session, None
            heir._session.user = heir
            heir._context = heir.ids if self._context is self.ids else self._context
            heir._reused, heir._prompt_logprobs = self._reused, self._prompt_logprobs
