"""Answers from replicas to clients: reading, pass-through, replay buffer and continuation."""
