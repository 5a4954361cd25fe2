"""edgeformer beside llama.cpp, onnxruntime-genai and OpenVINO GenAI: `python -m bench.peers`.

contestants.py   the files and settings that are compared
environments.py  a virtual environment for each project
models.py        the same model in each project's format, made by its own tools
runners/         one process, one peer: loads a file, runs the tests, prints JSON
rounds.py        interleaved rounds; disturbed ones are rejected
quality.py       perplexity and KL divergence of each file against the float model
results.py       medians, classes and the best peer, from saved results
pages.py, sizes_page.py, plots.py   bench/results/peers*.json -> docs/performance.md, README.md, docs/images
"""
