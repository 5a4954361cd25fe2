"""Tools of a request: their definitions, the grammar of their calls, and the calls of an answer."""
