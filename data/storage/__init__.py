"""How traces and activations are kept on disk: the store, its shards and manifest, and files that survive a crash."""
