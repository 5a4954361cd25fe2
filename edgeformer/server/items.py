"""The inputs of completions and embeddings: a text, token ids, or a list of either."""

from __future__ import annotations

from edgeformer.server.errors import ApiError

MOST_ITEMS = 2048  # OpenAI's limit of embeddings
Items = str | list[str | int | list[int]]


def items_of(given: Items, field: str) -> list[str | list[int]]:
    """The inputs one by one.

    Raises:
        ApiError: there is none or too many, or the list mixes kinds; `field` is what the request calls it.
    """
    if isinstance(given, str):
        return [given]
    ids = [one for one in given if isinstance(one, int)]
    if ids:
        if len(ids) < len(given):
            raise ApiError(400, f"{field} mixes numbers with texts or lists; expected all of one kind.", param=field)
        return [ids]
    found = [one for one in given if not isinstance(one, int)]
    if not 1 <= len(found) <= MOST_ITEMS:
        raise ApiError(400, f"{field} holds {len(found)} inputs, expected 1 to {MOST_ITEMS}.", param=field)
    if len({type(one) for one in found}) > 1:
        raise ApiError(400, f"{field} mixes texts and token ids; expected all of one kind.", param=field)
    return found
