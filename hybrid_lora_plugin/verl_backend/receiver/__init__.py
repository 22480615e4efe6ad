"""The receiving end of a weight sync: inside vLLM's server and its workers."""
