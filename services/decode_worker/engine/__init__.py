"""The leader: scheduling, requests, KV cache bookkeeping."""
