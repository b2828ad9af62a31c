"""``/v1/messages``: Anthropic's interface, on top of chats."""
