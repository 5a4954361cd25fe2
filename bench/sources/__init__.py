"""Which settings of a source are honoured, refused or irrelevant: `python -m bench.sources` tries each one."""
