"""Answers that follow a JSON Schema, a regular expression, a grammar or a choice, by llguidance."""

from edgeformer.decoding.constraints.compile import compile_constraint
from edgeformer.decoding.constraints.constraint import Constraint
from edgeformer.decoding.constraints.grammar import Grammar, GrammarConstraint
from edgeformer.decoding.constraints.spec import ConstraintSpec

__all__ = ["Constraint", "ConstraintSpec", "Grammar", "GrammarConstraint", "compile_constraint"]
