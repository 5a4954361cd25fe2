"""From a traced graph to one that is ready to decode."""
