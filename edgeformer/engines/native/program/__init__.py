"""The lowered program: operations on slots, and the weights that are packed for it."""
