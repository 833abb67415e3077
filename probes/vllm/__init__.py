"""Reading activations out of vLLM while it writes, by the HTTP interface of vllm-lens; vLLM itself is not needed here."""
