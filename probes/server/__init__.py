"""Models on a server, asked by the protocol of OpenAI."""
