"""`edgeformer serve` under load, beside other servers: `python -m bench.serving`.

workload.py         what clients ask: prompts of 32 to 1,024 tokens, half of them with one system prompt
client.py           the load client: a process of its own, which notes when bytes come and reads them afterwards
servers.py          the servers: commands, files, settings; starting and ending one
openvino_server.py  a minimal server around OpenVINO GenAI's continuous batching, which has none on PyPI
load.py             tokens a second, time to the first token and gaps by number of clients, and by arrivals a second
share.py            what HTTP, JSON and events take of the engine's throughput
soak.py             an hour of mixed load with clients that vanish, bad requests and restarts
plots.py            the pictures
"""
