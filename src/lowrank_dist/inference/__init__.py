"""Models on their sharded base that answer and are scored: text, chats, tasks of lm-evaluation-harness."""
