"""What has been captured: entries, their index in Redis, versions."""
