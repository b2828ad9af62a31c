"""``/v1/responses``: OpenAI's newer interface, on top of chats."""
