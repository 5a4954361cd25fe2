"""Prompt lookup: what followed the same words earlier, in this sequence or in recent answers.

Saxena, "Prompt Lookup Decoding" (2023); the store of recent answers as in SuffixDecoding (Oliaro et al.,
arXiv 2411.04975). A hash index of n-grams instead of a suffix tree: a match that was found once is followed token by
token, and so it is as long as a suffix tree would find it in all but rare cases, at a tenth of the cost in Python.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from edgeformer.decoding.speculation.drafts import LONGEST, NOTHING, Proposal

ORDERS = (4, 2, 1)  # lengths of the n-grams that are indexed, the longest first
STORE_ORDER = 3  # least match in another answer: shorter ones are right in only one of five cases
STORE_TOKENS = 1 << 14  # about 3 MB


class Lookup:
    """Guesses by the most recent occurrence of the last tokens, in the sequence itself or in `recent` answers.

    The match of the last guess goes on as long as the tokens are those that followed there. When it breaks, or is
    shorter, the most recent occurrence of the last 4, else 2, else 1 tokens is the new match.
    """

    def __init__(self, recent: RecentAnswers | None = None) -> None:
        self._tokens: list[int] = []
        self._index: dict[int, dict[tuple[int, ...], int]] = {order: {} for order in ORDERS}
        self._indexed = 0  # the n-grams that end before this position are in the index
        self._recent = recent
        self._source = self._tokens  # what holds the match: the sequence, or an answer of `recent`
        self._at = 0  # the guess: self._source[self._at]
        self._match = 0  # tokens before the guess that are the last ones of the sequence, at most LONGEST; 0: no guess

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that the sequence has accepted; first its prompt."""
        own, added = self._tokens, len(tokens)
        follows, source, at = self._match, self._source, self._at
        for token in tokens:
            if not follows or at >= len(source) or source[at] != token:
                follows = 0
                break
            follows, at = follows + 1, at + 1
            if source is own:
                own.append(token)  # the guess after it may be this token: in a loop the match overlaps the end
                added -= 1
        own.extend(tokens[len(tokens) - added :])
        self._add_ngrams()
        if not follows or at >= len(source):
            follows = 0
        if follows < ORDERS[0]:
            found = self._find(own)
            if found[2] > follows:
                source, at, follows = found
        self._source, self._at, self._match = source, at, min(follows, LONGEST)

    def propose(self, count: int, after: Sequence[int] = ()) -> Proposal:
        """At most `count` guesses of what follows the tokens of the sequence and then `after`."""
        source, at, match = self._source, self._at, self._match
        for token in after:
            match, at = (match + 1, at + 1) if match and at < len(source) and source[at] == token else (0, at)
        if after and not match:
            source, at, match = self._find([*self._tokens[-LONGEST:], *after])
        if not match or count < 1:
            return NOTHING
        found = source[at : at + count]
        if source is self._tokens and not after:
            while len(found) < count:  # the match reaches the end of the sequence: what repeats goes on repeating
                found += found[: count - len(found)]
        return Proposal(found, min(match, LONGEST)) if found else NOTHING

    def _add_ngrams(self) -> None:
        """Index the n-grams that now have a token after them."""
        tokens, begin, end = self._tokens, self._indexed, len(self._tokens)
        for order, index in self._index.items():
            first = max(begin, order)
            if end - first == 1:
                index[tuple(tokens[first - order : first])] = first
            elif end > first:
                shifted = (tokens[first - order + i : end - order + i] for i in range(order))
                index.update(zip(zip(*shifted, strict=True), range(first, end), strict=True))
        self._indexed = end

    def _find(self, tokens: Sequence[int]) -> tuple[list[int], int, int]:
        """(what holds the most recent match of the last tokens, the position after it, its length or 0)"""
        own = self._tokens
        at = match = 0
        for order, index in self._index.items():
            found = index.get(tuple(tokens[-order:])) if len(tokens) >= order else None
            if found is not None:
                at, match = found, _match_length(own, found, tokens, order)
                break
        if self._recent is not None and match < LONGEST:
            answer, place = self._recent.find(tokens)
            if answer and (other := _match_length(answer, place, tokens, STORE_ORDER)) > match:
                return answer, place, other
        return own, at, match


class RecentAnswers:
    """Answers of other sequences, of at most `limit` tokens in all; the least recently used goes first.

    Threads may share it.
    """

    def __init__(self, limit: int = STORE_TOKENS) -> None:
        self._limit = limit
        self._answers: OrderedDict[int, list[int]] = OrderedDict()
        self._index: dict[tuple[int, ...], tuple[int, int]] = {}  # n-gram -> (number of the answer, position after it)
        self._added = 0
        self._lock = Lock()
        self.tokens = 0  # that are held now

    def add(self, answer: Sequence[int]) -> None:
        """Hold an answer, and forget old ones if there is no room. One that is longer than the limit is cut."""
        kept = list(answer[-self._limit :])
        if len(kept) <= STORE_ORDER:
            return
        with self._lock:
            self._added += 1
            self._answers[self._added] = kept
            self.tokens += len(kept)
            places = ((self._added, place) for place in range(STORE_ORDER, len(kept)))
            self._index.update(zip(_ngrams(kept), places, strict=False))
            while self.tokens > self._limit:
                self._forget_oldest()

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The answer with the most recently added occurrence of the last 3 tokens, and the position after it; or []."""
        with self._lock:
            found = self._index.get(tuple(tokens[-STORE_ORDER:]))
            if found is None:
                return [], 0
            number, place = found
            self._answers.move_to_end(number)
            return self._answers[number], place

    def _forget_oldest(self) -> None:
        number, answer = self._answers.popitem(last=False)
        self.tokens -= len(answer)
        for ngram in _ngrams(answer):
            if self._index.get(ngram, (0, 0))[0] == number:
                del self._index[ngram]


def _ngrams(tokens: Sequence[int]) -> zip[tuple[int, ...]]:
    """The n-grams of STORE_ORDER tokens; the last has no token after it, and no place in an index."""
    return zip(*(tokens[i:] for i in range(STORE_ORDER)), strict=False)


def _match_length(source: Sequence[int], at: int, tokens: Sequence[int], known: int) -> int:
    """How many tokens before source[at] are the last ones of `tokens`: at least `known`, at most LONGEST."""
    length, most = known, min(LONGEST, at, len(tokens))
    while length < most and source[at - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
