"""edgeformer beside llama.cpp, onnxruntime-genai and OpenVINO GenAI: `python -m bench.peers`.

contestants.py   who takes part, with which files and settings
environments.py  a virtual environment for each project
models.py        the same model in each project's format, made by its own tools
runners/         one process, one peer: loads a file, runs the tests, prints JSON
rounds.py        interleaved rounds, and which of them are thrown away
quality.py       perplexity and KL divergence of each file against the float model
results.py       what saved results say: medians, classes, the best peer
pages.py, sizes_page.py, plots.py   bench/results/peers*.json -> docs/performance.md, README.md, docs/images
"""
