"""Graph passes, one file each. They rewrite a traced float graph in place, to one that decodes with a KV cache."""
