"""The HTTP edge: OpenAI's completions and chat API in front of the decode workers."""
